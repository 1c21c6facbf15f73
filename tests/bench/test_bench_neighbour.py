"""The neighbours are what the suite says: one bound to each core, busy only when told, gone afterwards."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench.bench_neighbour import neighbours

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _children() -> dict[int, str]:
    """State letter of each child process, by its number."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found[int(stat.parent.name)] = fields[0]
    return found


def _until(states: str, pids: set[int]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        now = _children()
        if all(now.get(pid, "gone") in states for pid in pids):
            return True
        time.sleep(0.01)
    return False


def test_neighbours_run_only_when_told():
    before = set(_children())
    with neighbours() as run:
        started = set(_children()) - before
        assert len(started) == len(os.sched_getaffinity(0))
        assert sorted(core for pid in started for core in os.sched_getaffinity(pid)) == sorted(
            os.sched_getaffinity(0)
        )
        assert _until("T", started)
        run(True)
        assert _until("R", started)
        run(False)
        assert _until("T", started)
    assert not started & set(_children())
