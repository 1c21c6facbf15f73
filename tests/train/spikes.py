"""A small GPT on a small text, and loaders and models that make it spike: for the tests of recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptcore.models import GPT
from gptcore.train import from_table, held_out, run

from .toy import Batch

TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8).astype(np.int64)
HELD_OUT = 1500  # bytes at the end of the text
MODEL = {"num_layers": 2, "width": 32, "context_length": 32, "vocab_size": 128, "attention": {"num_heads": 2}}


class TextLoader:
    """Windows of a text anywhere, with replacement; a pure function of (seed, step)."""

    def __init__(self, seed: int = 0, *, batch: int = 8, length: int = 32, held_out: bool = False) -> None:
        self.seed, self.shape = seed, (batch, length)
        self.text = TEXT[-HELD_OUT:] if held_out else TEXT[:-HELD_OUT]

    def batch_at(self, step: int) -> Batch:
        batch, length = self.shape
        rng = np.random.default_rng((self.seed, step))
        rows = rng.integers(0, len(self.text) - length, (batch, 1)) + np.arange(length + 1)
        return Batch(self.text[rows[:, :-1]], self.text[rows[:, 1:]], target_bytes=batch * length)


class Corrupted(TextLoader):
    """The batches with index in ``bad`` have the targets of another text: random bytes below 128."""

    def __init__(self, bad: range, **options: Any) -> None:
        super().__init__(**options)
        self.bad = bad
        self.served: list[int] = []

    def batch_at(self, step: int) -> Batch:
        self.served.append(step)
        batch = super().batch_at(step)
        if step not in self.bad:
            return batch
        rng = np.random.default_rng((self.seed, step, 1))
        return batch._replace(targets=rng.integers(0, 128, batch.targets.shape))


class PoisonedGPT(GPT):
    """Gives a NaN loss at its ``calls`` th training forward, once: a machine's slip, not the data's."""

    def __init__(self, *arguments: Any, calls: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls_left = calls

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = super().forward(*arguments, **options)
        self.calls_left -= self.training
        return out._replace(loss=out.loss * float("nan")) if self.calls_left == 0 and self.training else out


def table(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """300 updates, a checkpoint every 20; the loss is a reason to go back."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "steps": 300,
        "model": MODEL,
        "data": {"batch": 8, "length": 32},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup": 10},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 20, "keep_last": 2},
        "recovery": {"loss": "rewind"},
    }
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return values


def train(settings: dict[str, Any], loader: Any = None, model: GPT | None = None, **options: Any) -> Any:
    """Train as ``settings`` say; returns the model and its held-out loss in nats per byte."""
    config = from_table(settings)
    model = GPT(config.model_config(), seed=config.seed) if model is None else model
    run(
        config, model=model, loader=loader or TextLoader(), measure_peak=False, quiet=True, **options
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        return model, held_out(TextLoader(seed=5, batch=32, held_out=True), 4)(model)["val_loss"]
