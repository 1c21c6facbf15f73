"""One rank of a small sharded run, ``python sharded_program.py CONFIG_JSON`` under torchrun's variables.

And starting all ranks of one, for tests that kill some of them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, **environment, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(table)]
    return [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120.0) -> list[tuple[int, str]]:
    """Exit code and standard error of each rank."""
    ends = []
    for process in processes:
        try:
            text = process.communicate(timeout=timeout)[1]
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        ends.append((process.returncode, text))
    return ends


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
