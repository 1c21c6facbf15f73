"""Runs the cases of ``*_cases.py`` in groups of processes: one start per number of ranks, a verdict per case and rank.

A case is a function of a :class:`World`. Every case has a process group of its own, whose collectives give up after
``PATIENCE`` seconds, so that a rank that fails neither hangs the others for long nor spoils the next case.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as c10d

PATIENCE = 10.0
LIMIT = 75.0


class World(NamedTuple):
    """What a case is given."""

    rank: int
    ranks: int
    group: Any


Case = Callable[[World], None]


def verdicts(
    modules: Sequence[str], ranks: int, folder: Path, *, limit: float = LIMIT
) -> dict[str, list[str]]:
    """By case of ``modules`` the tracebacks of its ``ranks`` ranks, "" where it went well; all within ``limit`` s."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    # Read by OpenMP when a child starts; many processes share few cores here.
    os.environ["OMP_NUM_THREADS"], before = "1", os.environ.get("OMP_NUM_THREADS")
    try:
        children = [
            context.Process(
                target=_run, args=(modules, rank, ranks, str(folder / "store"), queue), daemon=True
            )
            for rank in range(ranks)
        ]
        for child in children:
            child.start()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    silent = "no verdict: a process ended, or all were too slow"
    found = {name: [silent] * ranks for name in cases_of(modules)}
    end = time.monotonic() + limit
    finished = 0
    while finished < ranks and time.monotonic() < end:
        if queue.empty():
            if any(child.exitcode for child in children):
                break  # without its partner no other rank gets on
            time.sleep(0.01)
            continue
        rank, name, text = queue.get()
        finished += name == ""
        if name:
            found[name][rank] = text
    for child in children:
        child.join(timeout=5)
        if child.is_alive():
            child.kill()
    return found


def shared_verdicts(
    modules: Sequence[str], ranks: int, factory: pytest.TempPathFactory, *, limit: float = LIMIT
) -> dict[str, list[str]]:
    """``verdicts``, made once though pytest-xdist's workers may each ask for them."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place = root / f"verdicts-{modules[0]}-{ranks}.json"
    with open(place.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            found = verdicts(modules, ranks, factory.mktemp("group"), limit=limit)
            place.write_text(json.dumps(found))
    return json.loads(place.read_text())


def cases_of(modules: Sequence[str]) -> dict[str, Case]:
    return {name: case for module in modules for name, case in importlib.import_module(module).CASES.items()}


def _run(modules: Sequence[str], rank: int, ranks: int, store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE)
    c10d.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT)
    )
    for name, case in cases_of(modules).items():
        text = ""
        try:
            # Every case draws what it draws whichever cases came before.
            torch.manual_seed(0)
            case(World(rank, ranks, c10d.new_group(timeout=patience)))
        except BaseException:
            text = traceback.format_exc()
        queue.put((rank, name, text))
    queue.put((rank, "", ""))
    c10d.destroy_process_group()
