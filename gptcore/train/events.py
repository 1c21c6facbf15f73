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

from gptcore.errors import UserError


class EventLog:
    """The log of one run, opened where a checkpoint left it.

    A run that is killed and resumed decides again what it decided after its checkpoint. So a checkpoint keeps the
    number of events before it, and opening the log at that number drops what comes again. After a rewind the number
    goes on: the log tells of updates that were undone, too.
    """

    def __init__(self, path: str | os.PathLike[str], count: int) -> None:
        self.path = Path(path)
        kept = _lines(self.path)[:count]
        self.count = len(kept)
        self._digest = hashlib.sha256()
        for line in kept:
            self._digest.update(_comparable(json.loads(line)))
        try:
            self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
            self._file.truncate(sum(map(len, kept)))
        except OSError as error:
            raise UserError(f"cannot open {self.path}: {error.strerror}") from error

    @property
    def digest(self) -> int:
        """63 bits over all events but their times, for ranks to compare."""
        return int.from_bytes(self._digest.digest()[:8], "big") >> 1

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one event. NaN and infinity, which JSON lacks, become strings; None is left out."""
        event = {"step": step, "kind": kind}
        event.update({name: _plain(value) for name, value in fields.items() if value is not None})
        line = json.dumps({**event, "time": round(time.time(), 3)}) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.count += 1
        self._digest.update(_comparable(event))

    def sync(self) -> None:
        """Force the lines to the disk, so that no checkpoint knows of an event that the log lacks."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file; what a full disk kept from being written was reported by ``write`` already."""
        try:
            self._file.close()
        except OSError:
            return


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a log in order, without their times, so that two logs of the same decisions are equal."""
    events = [json.loads(line) for line in _lines(Path(path))]
    return [{name: value for name, value in event.items() if name != "time"} for event in events]


def _comparable(event: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in event.items() if name != "time"}).encode() + b"\n"


def _lines(path: Path) -> list[bytes]:
    """The leading whole lines that are events; a kill may have cut the last one short."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    lines = []
    for line in data.splitlines(keepends=True):
        try:
            if not (line.endswith(b"\n") and isinstance(json.loads(line).get("step"), int)):
                break
        except (ValueError, AttributeError):
            break
        lines.append(line)
    return lines


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
