"""A stage that learns from single labels, for tests of how updates are cut, and a program that is one of its ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .supervised_cases import copying, write_rows


def labels(path: Path) -> Path:
    """Good answers, and bad ones that say another letter."""
    rows = [
        {**row, "completion": "z" * (i % 7 + 1) if i % 2 else row["completion"], "label": i % 2 == 0}
        for i, row in enumerate(copying(40))
    ]
    return write_rows(path, rows)


def table_of(run_dir: Path, start: Path, files: Path, **data: int) -> dict[str, Any]:
    """Three updates of four answers by plain SGD, with a reference point that has left 0 after the first."""
    return {
        "run_dir": str(run_dir), "start": str(start), "steps": 3, "data": {"length": 32, **data},
        "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.0, "max_norm": 0.0}, "checkpoint": {"every": 3},
        "evaluation": {"every": 3}, "sample": {"every": 0}, "schedule": {"name": "constant", "warmup": 0},
        "preference": {"files": [str(files)], "loss_type": "kto", "beta": 0.5, "template": "none"},
    }  # fmt: skip


def learn(table: dict[str, Any], *, writes: bool = True) -> None:
    """The stage of ``table``."""
    from gptcore.align.comparisons import prepare_preferences, train
    from gptcore.align.preference_spec import PreferenceSpec

    spec = PreferenceSpec.from_dict(table.pop("preference"))
    train(prepare_preferences(table, spec), quiet=True, writes=writes)


if __name__ == "__main__":
    from gptcore.train import processes

    with processes.started("cpu", 60.0) as member:
        learn(json.loads(sys.argv[1]), writes=member.rank == 0)
