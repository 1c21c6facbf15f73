"""A training loop written out: GPT, loader, optimizer and schedule from gptcore, thirty visible lines.

Trains a character model on this interpreter's own documentation for a few seconds and lets it write.
"""

from __future__ import annotations

import math
import pydoc_data.topics

import torch

from gptcore.data import tokenizer
from gptcore.infer import generate
from gptcore.models import GPT, presets
from gptcore.optim import AdamW, schedule

STEPS, BATCH = 150, 12

text = "\n".join(pydoc_data.topics.topics.values())
letters = tokenizer.train([text], kind="characters", eot=False)
tokens = torch.tensor(letters.encode(text))

config = presets.get("shakespeare-char", {"vocab_size": letters.vocab_size})
model = GPT(config, seed=0)
length = config.context_length
optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, max_norm=1.0)
pick = torch.Generator().manual_seed(0)

for step in range(STEPS):
    starts = torch.randint(0, len(tokens) - length - 1, (BATCH,), generator=pick)
    rows = tokens[starts[:, None] + torch.arange(length + 1)]
    loss = model(rows[:, :-1], rows[:, 1:]).loss
    for group in optimizer.param_groups:
        group["lr"] = schedule.cosine(step, peak=1e-3, floor=1e-4, warmup=20, steps=STEPS)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0 or step == STEPS - 1:
        print(
            f"step {step:4d}  loss {loss.item():.3f}  (uniform would be {math.log(letters.vocab_size):.3f})"
        )

print(generate(model, letters, "The ", max_new_tokens=120, temperature=0.8, seed=0, overflow="slide").text)
