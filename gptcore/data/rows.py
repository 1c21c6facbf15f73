"""Rows of JSONL, JSON and Parquet files, each with the place where it stood, so that an error can name it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptcore.data.reading import COMPRESSIONS, decompressed
from gptcore.errors import UserError

FORMATS = (".jsonl", ".json", ".parquet")


class Row(NamedTuple):
    """``values`` by key, without the keys that hold nothing; ``place``: file and line (or row), from 1."""

    values: Mapping[str, Any]
    place: str

    def get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """The value at ``key``. Raises UserError where there is none, or one that is no ``kind``."""
        if key not in self.values:
            known = ", ".join(sorted(map(str, self.values))) or "none"
            raise UserError(f"key '{key}' is missing, expected {expected}; the row has: {known}")
        value = self.values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise UserError(
                f"key '{key}': got {type(value).__name__} {_shortened(value)}, expected {expected}"
            )
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text at ``key``; ``default`` where there is none."""
        if default is not None and key not in self.values:
            return default
        return str(self.get(key, str, "text"))


def rows_of(path: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of one file: ``.jsonl``, ``.json`` (one array of objects) or ``.parquet``, also with .gz or .zst.

    Keys that hold None are left out, at every depth: tables of a fixed schema fill in keys that a row never had.

    Raises:
        UserError: no such file, of another kind, damaged, or a line that is no JSON object; names the line.
    """
    place = Path(path)
    kind = _format_of(place)
    if kind is None:
        known = f"{', '.join(FORMATS)} (also with {' or '.join(COMPRESSIONS)})"
        raise UserError(f"{place}: unknown kind of file, expected {known}")
    read = {".jsonl": _lines, ".json": _array, ".parquet": _table}[kind]
    try:
        with open(place, "rb") as raw:
            for where, values in read(raw, place):
                if not isinstance(values, Mapping):
                    raise UserError(f"{where}: got a JSON {type(values).__name__}, expected an object")
                yield Row(without_none(values), where)
    except FileNotFoundError:
        raise UserError(f"no file at '{place}'") from None
    except EOFError:
        raise UserError(f"{place}: truncated: the compressed data ends in the middle") from None
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror or error}") from None


def without_none(value: Any) -> Any:
    """``value`` with every key that holds None left out, however deep."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _lines(raw: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(decompressed(raw, path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _json(line, where)


def _array(raw: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    values = _json(decompressed(raw, path).read(), str(path))
    if not isinstance(values, list):
        raise UserError(f"{path}: got a JSON {type(values).__name__}, expected an array of objects")
    for number, value in enumerate(values, 1):
        yield f"{path}, row {number}", value


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte 0x{data[error.start]:02x})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def _table(raw: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        packed = path.suffix.lower() in COMPRESSIONS
        table = pq.ParquetFile(pa.BufferReader(decompressed(raw, path).read()) if packed else path)
        for batch in table.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", values
    except pa.ArrowException as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}, after row {number}: cannot be read as Parquet: {first}") from None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
