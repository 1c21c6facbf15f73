"""Files of a run that grow by a line at a time: JSON objects, each with ``step`` (updates done)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptcore.errors import UserError


class LineFile:
    """The file at ``path``, open behind its first ``length`` bytes; what lies beyond them is dropped.

    Every line is handed to the system when it is written. A write that fails is an error of one sentence; a line that a
    kill cut short is none to :func:`leading_lines`.

    Raises:
        UserError: no permission, a full disk; in every method but ``close``.
    """

    def __init__(self, path: str | os.PathLike[str], length: int) -> None:
        self.path = Path(path)
        with _in_one_sentence("open", self.path):
            self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
            self._file.truncate(length)

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line."""
        with _in_one_sentence("write", self.path):
            self._file.write(json.dumps(values).encode() + b"\n")
            self._file.flush()

    def cut(self, length: int) -> None:
        """Drop all but the first ``length`` bytes."""
        with _in_one_sentence("write", self.path):
            self._file.truncate(length)

    def sync(self) -> None:
        """Force the lines to the disk, so that no checkpoint knows of one that the file lacks."""
        with _in_one_sentence("write", self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what a full disk kept from being written was reported by ``append`` already."""
        with suppress(OSError):
            self._file.close()


def parse(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None for one that is torn or none of ours."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def lines(path: Path) -> list[bytes]:
    """All lines of a file, good or not; none if there is no file. Raises UserError for one that cannot be read."""
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def leading_lines(path: Path, wanted: Callable[[dict[str, Any]], bool] = lambda _: True) -> list[bytes]:
    """The first whole lines of a file, up to one that is torn, foreign or not ``wanted``."""
    found = []
    for line in lines(path):
        values = parse(line)
        if values is None or not wanted(values):
            break
        found.append(line)
    return found


@contextmanager
def _in_one_sentence(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {verb} {path}: {error.strerror}") from error
