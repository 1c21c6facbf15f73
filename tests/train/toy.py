"""A GPT-shaped toy in plain torch, and a loader, so that the loop is tested apart from the kernels.

Also a program, ``python toy.py CONFIG_JSON``: trains, for tests that kill it or limit it.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import numpy as np
import torch


class Loss(NamedTuple):
    loss: torch.Tensor
    z_loss: torch.Tensor


class Batch(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray | None = None
    target_bytes: int = 0


class Toy(torch.nn.Module):
    """Embedding, dropout (so that generator state matters), one feed-forward, tied head, an f32 buffer."""

    def __init__(self, vocab: int = 32, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embedding = torch.nn.Parameter(0.1 * torch.randn(vocab, width, generator=generator))
        self.up = torch.nn.Parameter(0.2 * torch.randn(width, 2 * width, generator=generator))
        self.down = torch.nn.Parameter(0.2 * torch.randn(width, 2 * width, generator=generator))
        self.bias = torch.nn.Parameter(torch.zeros(2 * width))
        self.head = self.embedding
        self.dropout = torch.nn.Dropout(dropout)
        self.register_buffer("table", torch.linspace(0, 1, width))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, *, z_loss: float = 0.0) -> Loss:
        x = self.dropout(self.embedding[tokens]) + self.get_buffer("table").to(self.embedding.dtype)
        x = x + torch.tanh(x @ self.up + self.bias) @ self.down.T
        logits = (x @ self.head.T).float()
        lse = logits.logsumexp(-1)
        picked = logits.gather(-1, targets[..., None])[..., 0]
        return Loss((lse - picked).mean(), z_loss * lse.square().mean())


class ToyLoader:
    """Counts upwards from a random token, with noise: learnable, and a pure function of (seed, step)."""

    def __init__(self, batch: int = 4, length: int = 8, vocab: int = 32, seed: int = 0) -> None:
        self.shape, self.vocab, self.seed = (batch, length), vocab, seed

    def batch_at(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        start = rng.integers(0, self.vocab, (self.shape[0], 1))
        text = (start + np.arange(self.shape[1] + 1) + (rng.random((self.shape[0], 1)) < 0.1)) % self.vocab
        tokens, targets = text[:, :-1].astype(np.int64), text[:, 1:].astype(np.int64)
        return Batch(tokens, targets, target_bytes=2 * targets.size)


def settings(run_dir: Any, **changes: Any) -> dict[str, Any]:
    """A table for ``TrainConfig``: 40 updates of the toy, a checkpoint every 5."""
    table: dict[str, Any] = {
        "run_dir": str(run_dir),
        "steps": 40,
        "data": {"batch": 4, "length": 8},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup": 5},
        "evaluation": {"every": 10, "batches": 3},
        "checkpoint": {"every": 5, "keep_last": 2},
    }
    for name, value in changes.items():
        table[name] = {**table.get(name, {}), **value} if isinstance(value, dict) else value
    return table


# The real model at its smallest, for the tests that are about it: what the toy has not (norms, attention).
TINY_GPT = {
    "num_layers": 2,
    "width": 32,
    "context_length": 8,
    "vocab_size": 32,
    "attention": {"num_heads": 2},
}


def train(table: dict[str, Any], **options: Any) -> Any:
    """Trains the GPT of ``table["model"]``, without one the toy; returns model and result."""
    from gptcore.models import GPT
    from gptcore.train import from_table, held_out, run

    config = from_table(table)
    model = GPT(config.model_config(), seed=config.seed) if config.model else Toy()
    evaluate = held_out(ToyLoader(seed=1), 3)
    defaults = {"evaluate": evaluate, "measure_peak": False, "quiet": True}
    return model, run(config, model=model, loader=ToyLoader(), **{**defaults, **options})


if __name__ == "__main__":
    from gptcore.errors import UserError

    try:
        train(json.loads(sys.argv[1]), quiet=False)
    except UserError as error:
        print(f"gptcore: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
