"""A torch program before and after one line: the same encoder, the same losses, gptcore's kernels under it."""

from __future__ import annotations

import copy

import torch
from torch import nn

import gptcore


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(1000, 256), nn.LayerNorm(256)
        self.up, self.act, self.down = nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(self.norm(self.table(tokens)))).mean(1))


def train(model: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        tokens = torch.randint(0, 1000, (32, 64), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), (tokens < 500).sum(1) * 10 // 65)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


before = Classifier()
after = copy.deepcopy(before)
gptcore.replace(after)  # the one line; gptcore.restore(after) undoes it
for step, (a, b) in enumerate(zip(train(before), train(after), strict=True)):
    if step % 5 == 0:
        print(f"step {step:2}  torch {a:.6f}  gptcore {b:.6f}")
