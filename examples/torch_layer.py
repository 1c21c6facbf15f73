"""gptcore in a torch program: change the import, keep the code.

Trains a small text classifier on made-up data twice, once with torch's functions and once with gptcore's, and
shows that the losses agree and which calls still went to torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional

import gptcore.functional as gptcore_functional
from gptcore import backend


def train(functional, steps: int = 30) -> float:
    """Loss after ``steps`` of a one-layer attention classifier built on ``functional``."""
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 50, (16, 24)), torch.randint(0, 4, (16,))
    table = torch.randn(50, 32, requires_grad=True)
    qkv = torch.nn.Parameter(torch.randn(96, 32) * 0.1)
    head = torch.nn.Parameter(torch.randn(4, 32) * 0.1)
    optimizer = torch.optim.Adam([table, qkv, head], lr=0.01)
    for _ in range(steps):
        x = functional.layer_norm(functional.embedding(ids, table), (32,))
        q, k, v = functional.linear(x, qkv).view(16, 24, 3, 4, 8).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = functional.linear(functional.gelu(x.transpose(1, 2).flatten(2)).mean(1), head)
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    theirs, ours = train(torch_functional), train(gptcore_functional)
    print(f"loss after 30 steps: torch {theirs:.6f}, gptcore {ours:.6f}")
    print("calls that went to torch:", backend.report())
    assert abs(theirs - ours) < 1e-4
