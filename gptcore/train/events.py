"""The event log of a run: what was seen, decided and done, one JSON object a line.

A line has ``step`` (updates done, as in the metrics), ``kind`` (``seen``, ``decided`` or ``done``), what belongs to it,
and last ``time`` (seconds since 1970), the only field that differs between ranks or from run to run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from gptcore.train.line_file import LineFile, leading_lines


class EventLog(LineFile):
    """The log of one run, opened where a checkpoint left it.

    A run that is killed and resumed decides again what it decided after its checkpoint. So a checkpoint keeps the
    number of events before it, and opening the log at that number drops what comes again. After a rewind the number
    goes on: the log tells of updates that were undone, too.
    """

    def __init__(self, path: str | os.PathLike[str], count: int) -> None:
        kept = leading_lines(Path(path))[:count]
        super().__init__(path, sum(map(len, kept)))
        self.count = len(kept)
        self._digest = hashlib.sha256()
        for line in kept:
            self._digest.update(_comparable(json.loads(line)))

    @property
    def digest(self) -> int:
        """63 bits over all events but their times, for ranks to compare."""
        return int.from_bytes(self._digest.digest()[:8], "big") >> 1

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one event. NaN and infinity, which JSON lacks, become strings; None is left out."""
        event = {"step": step, "kind": kind}
        event.update({name: _plain(value) for name, value in fields.items() if value is not None})
        self.append({**event, "time": round(time.time(), 3)})
        self.count += 1
        self._digest.update(_comparable(event))


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a log in order, without their times, so that two logs of the same decisions are equal."""
    events = [json.loads(line) for line in leading_lines(Path(path))]
    return [{name: value for name, value in event.items() if name != "time"} for event in events]


def _comparable(event: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in event.items() if name != "time"}).encode() + b"\n"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
