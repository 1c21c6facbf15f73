"""The directory of one run, and the lock that keeps a second run out of it.

``checkpoints/``, ``metrics.jsonl``, ``events.jsonl``, ``config.json``, ``loss.png`` and ``lock``; of a
model with experts also ``routing.png``; after a rewind ``metrics-undone-1.jsonl`` and so on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gptcore.errors import UserError


class RunDirectory:
    """A run's files; use as a context manager, which holds the lock.

    The lock belongs to the process and goes with it, so a killed run leaves none behind. Of several processes each
    has its own metrics and events, rank r's in ``ranks/r``; rank 0's are the run's, and the checkpoints are everyone's.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0) -> None:
        self.path = Path(path) / "ranks" / str(rank) if rank else Path(path)
        self.checkpoints = Path(path) / "checkpoints"
        self.best = Path(path) / "best"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.config = self.path / "config.json"
        self.curve = self.path / "loss.png"
        self.routing = self.path / "routing.png"

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot use run directory {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise UserError(f"run directory {self.path} is in use by process {owner}") from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def undone(self, number: int) -> Path:
        """Where the metrics of the updates go that the run's rewind ``number`` undid."""
        return self.path / f"metrics-undone-{number}.jsonl"

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Keep the resolved settings beside the results."""
        temporary = self.config.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self.config)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.config}: {error.strerror}") from error
