"""One rank of a small sharded run, ``python sharded_program.py CONFIG_JSON`` under torchrun's variables.

And starting all ranks of one, for tests that kill some of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.ranks import start as launched

LEAVES = 12


def settings(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """An update has 12 leaves of one sequence: 1, 2, 3, 4, 6 or 12 ranks may share it."""
    table: dict[str, Any] = {
        "run_dir": str(run_dir),
        "steps": 8,
        "model": {
            "vocab_size": 128, "context_length": 16, "num_layers": 2, "width": 36, "dropout": 0.1,
            "attention": {"num_heads": 3},
        },
        "data": {"batch": 1, "length": 16, "accumulate": LEAVES},
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant", "warmup": 2},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 2, "keep_last": 3},
        "parallel": {"timeout": 20.0},
    }  # fmt: skip
    for name, value in changes.items():
        table[name] = {**table.get(name, {}), **value} if isinstance(value, dict) else value
    return table


def start(ranks: int, table: dict[str, Any], **environment: str) -> list[subprocess.Popen[str]]:
    """The processes of a run, in rank order."""
    return launched(ranks, __file__, json.dumps(table), **environment)


def main() -> int:
    from gptcore.errors import UserError
    from gptcore.models import GPT
    from gptcore.train import from_table, processes, run
    from tests.train.spikes import TextLoader

    config = from_table(json.loads(sys.argv[1]))
    model = GPT(config.model_config(), seed=config.seed)
    try:
        with processes.started("cpu", config.parallel.timeout):
            run(config, model=model, loader=TextLoader(batch=1, length=16), measure_peak=False, quiet=True)
    except UserError as error:
        print(f"gptcore: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a backend that waits for a dead rank must not keep this process
