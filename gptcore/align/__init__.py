"""Alignment: from a pretrained model to an assistant."""
