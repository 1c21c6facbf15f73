"""What gptcore is measured against, written as its own users would write it."""
