"""A trained model as small as can be, demonstrations that it can learn, and a program for tests with several ranks."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from gptcore.data.characters import ByteTokenizer
from gptcore.models import GPT

MODEL = {"num_layers": 2, "width": 48, "context_length": 96, "vocab_size": 257, "attention": {"num_heads": 3}}


def base_run(directory: Path, **changes: Any) -> Path:
    """A run with one checkpoint of a model whose weights are random, and its tokenizer."""
    from gptcore import train
    from gptcore.data.loader import Batch

    class Noise:
        def batch_at(self, step: int) -> Batch:
            import numpy as np

            rows = np.random.default_rng(step).integers(97, 123, (2, 17))
            return Batch(rows[:, :-1], rows[:, 1:], None, 32, 32, step)

    table = {
        "run_dir": str(directory), "steps": 1, "model": {**MODEL, **changes}, "data": {"batch": 2, "length": 16},
        "evaluation": {"every": 0}, "schedule": {"warmup": 0},
    }  # fmt: skip
    config = train.from_table(table)
    tokenizer = ByteTokenizer()
    tokenizer.save(directory / "tokenizer")
    model = GPT(config.model_config(), seed=3)
    train.run(config, model=model, loader=Noise(), tokenizer=tokenizer, measure_peak=False, quiet=True)
    return directory


def copying(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows that ask for a letter to be said as often as is told."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        letter, times = draw.choice("abcdef"), draw.randint(1, 9)
        rows.append({"prompt": f"{times}{letter}", "completion": letter * times})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table_of(run_dir: Path, start: Path, files: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a short stage."""
    table: dict[str, Any] = {
        "run_dir": str(run_dir), "start": str(start), "steps": 12, "data": {"batch": 2, "length": 64},
        "optimizer": {"lr": 3e-3}, "checkpoint": {"every": 4}, "evaluation": {"every": 4}, "sample": {"every": 0},
        "sft": {"files": str(files), "template": "none"},
    }  # fmt: skip
    for name, value in changes.items():
        table[name] = {**table.get(name, {}), **value} if isinstance(value, dict) else value
    return table


if __name__ == "__main__":
    from gptcore.align.supervised import prepare, train
    from gptcore.align.supervised_spec import SFTSpec
    from gptcore.train import processes

    settings = json.loads(sys.argv[1])
    stage = prepare(settings, SFTSpec.from_dict(settings.pop("sft")))
    with processes.started("cpu", 60.0) as member:
        train(stage, quiet=True, writes=member.rank == 0)
