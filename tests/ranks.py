"""Programs as torchrun starts them: one process a rank, which find each other through the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(ranks: int, *program: str, **environment: str) -> list[subprocess.Popen[str]]:
    """The processes of ``program``, what follows the interpreter's name, in rank order; one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, **environment, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *program], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
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
