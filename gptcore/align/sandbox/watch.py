"""Waits for a check to end, reads what it writes, and ends it when it has had or said enough."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import Any

_POLL = 0.05  # seconds between looks at the directory, where nothing else limits it
_TICK = 0.005


class Watch:
    """Reads what a check writes and ends it when it has had or said enough."""

    def __init__(self, limits: dict[str, Any], ends: dict[str, int], jobs: int) -> None:
        self.limits = limits
        self.said = {name: bytearray() for name in ends}
        self.most = {"output": limits["output"], "result": limits["output"] + 4096, "status": 256}
        self.names = {end: name for name, end in ends.items()}
        self.jobs = jobs
        self.verdict = ""

    def until_end(self, child: int, began: float, watched: str) -> int:
        """The wait status of ``child``, killed at its limits. ``watched``: the directory to measure, or empty."""
        deadline, look = began + self.limits["seconds"], began + _POLL
        gone = 0
        with _exit_of(child) as end:
            while not gone and not self.verdict:
                now = time.monotonic()
                if now >= deadline:
                    self.verdict = "timeout"
                elif watched and now >= look:
                    look = now + _POLL
                    if _size(watched) > self.limits["directory"]:
                        self.verdict = "disk"
                patience = _TICK if end is None else _POLL if watched else 1.0
                self._read(
                    min(max(deadline - now, 0.0), patience), [self.jobs] if end is None else [self.jobs, end]
                )
                gone, status, usage = os.wait4(child, os.WNOHANG)
        if not gone:
            _kill(child)
            _, status, usage = os.wait4(child, 0)
        self.cpu = usage.ru_utime + usage.ru_stime
        while self.names and self._read(0.0, []):
            pass
        return status

    def _read(self, seconds: float, others: list[int]) -> bool:
        """Wait for more to read, or for one of ``others``; False where there was nothing."""
        ready, _, _ = select.select([*self.names, *others], [], [], seconds)
        for end in ready:
            if end == self.jobs:  # nobody sends a job before the report: the owner has gone
                self.verdict = self.verdict or "abandoned"
            if end not in self.names:
                continue
            name = self.names[end]
            piece = os.read(end, 65536)
            if not piece:
                del self.names[end]
                continue
            room = self.most[name] - len(self.said[name])
            self.said[name] += piece[:room]
            if len(piece) > room:
                self.verdict = self.verdict or "said too much"
                del self.names[end]
        return bool(ready)


@contextlib.contextmanager
def _exit_of(child: int) -> Iterator[int | None]:
    """A descriptor that becomes readable when ``child`` ends, where the system has them."""
    if not hasattr(os, "pidfd_open"):
        yield None
        return
    end = os.pidfd_open(child)
    try:
        yield end
    finally:
        os.close(end)


def _kill(child: int) -> None:
    """The check's whole session, which is its process group too, then itself."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)


def _size(directory: str) -> int:
    total = 0
    for where, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_blocks * 512 + 4096
    return total
