"""Documents out of files: .txt, .jsonl and .parquet, each also as .zst or .gz, streamed.

Every error names the file and the line (or row): what is wrong in a terabyte must be findable.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gptcore.errors import UserError

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".zst", ".gz")
PIECE_CHARACTERS = 1 << 18  # a longer text file comes in pieces of about this size, one thread's work
_READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it stood. ``ends=False``: the next one continues the same document."""

    text: str
    origin: str
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read: ``text_field`` of JSON objects and Parquet columns; ``separator`` between the documents
    of a text file, default none (a file is one document); ``errors``: ``"strict"``, or ``"replace"`` what is
    not UTF-8 by U+FFFD."""

    text_field: str = "text"
    separator: str | None = None
    errors: str = "strict"

    def __post_init__(self) -> None:
        if self.errors not in ("strict", "replace"):
            raise UserError(f"errors: got '{self.errors}', expected 'strict' or 'replace'")
        if self.separator == "":
            raise UserError("separator: got an empty string, expected the text between two documents")


def find_files(inputs: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that ``inputs`` name, directories walked in the order of names. Raises ``UserError`` for
    what is missing, empty or of an unknown kind."""
    found: list[Path] = []
    for entry in inputs:
        path = Path(entry)
        if path.is_dir():
            walked = (Path(at) / name for at, _, names in os.walk(path) for name in names)
            inside = sorted(file for file in walked if format_of(file) and not file.name.startswith("."))
            if not inside:
                raise UserError(f"{path}: holds no {_known()} file")
            found.extend(inside)
        elif not path.exists():
            raise UserError(f"no file or directory at '{path}'")
        elif format_of(path) is None:
            raise UserError(f"{path}: unknown kind of file, expected {_known()} (also with .zst or .gz)")
        else:
            found.append(path)
    if not found:
        raise UserError("no input given, expected files or directories")
    return found


def format_of(path: Path) -> str | None:
    """``.txt``, ``.jsonl`` or ``.parquet``, a compression left aside; None for anything else."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _known() -> str:
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


class FileReader:
    """The documents of one file. ``position``: bytes of the file consumed so far, for progress."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self._reading = reading
        self._raw: BinaryIO | None = None
        self.position = 0

    def __iter__(self) -> Iterator[Document]:
        kind = format_of(self.path)
        read = {".txt": self._texts, ".jsonl": self._lines, ".parquet": self._rows}[kind or ".txt"]
        try:
            with open(self.path, "rb") as raw:
                self._raw = raw
                for document in read(decompressed(raw, self.path)):
                    self.position = max(self.position, raw.tell())
                    yield document
                self.position = raw.seek(0, os.SEEK_END)
        except EOFError:
            raise UserError(f"{self.path}: truncated: the compressed data ends in the middle") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _texts(self, file: io.BufferedIOBase) -> Iterator[Document]:
        separator = self._reading.separator
        pending, lines = "", 1
        for block in self._decoded(file):
            pending += block
            if separator is not None:
                *whole, pending = pending.split(separator)
                for text in whole:
                    yield Document(text.strip("\n"), f"{self.path}, line {lines}")
                    lines += text.count("\n") + separator.count("\n")
            elif len(pending) >= PIECE_CHARACTERS and (cut := _safe_cut(pending)):
                yield Document(pending[:cut], f"{self.path}, line {lines}", ends=False)
                lines += pending.count("\n", 0, cut)
                pending = pending[cut:]
        yield Document(pending if separator is None else pending.strip("\n"), f"{self.path}, line {lines}")

    def _decoded(self, file: io.BufferedIOBase) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(self._reading.errors)
        lines = 1
        for first in (True, False):
            while block := file.read(_READ_BYTES):
                yield (text := self._decode(decoder, block, lines)).removeprefix("\ufeff" if first else "")
                lines += text.count("\n")
                if first:
                    break
        yield self._decode(decoder, b"", lines)

    def _decode(self, decoder: codecs.IncrementalDecoder, block: bytes, lines: int) -> str:
        try:
            return decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = lines + error.object[: error.start].count(b"\n")
            raise self._not_utf8(f"line {line}", error) from None

    def _not_utf8(self, place: str, error: UnicodeDecodeError) -> UserError:
        value = error.object[error.start]
        return UserError(
            f"{self.path}, {place}: not UTF-8 (byte 0x{value:02x});"
            " convert the file, or read it with errors='replace'"
        )

    def _lines(self, file: io.BufferedIOBase) -> Iterator[Document]:
        field, errors = self._reading.text_field, self._reading.errors
        for number, line in enumerate(file, 1):
            place = f"{self.path}, line {number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8", errors).removeprefix("\ufeff"))
            except UnicodeDecodeError as error:
                raise self._not_utf8(f"line {number}", error) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not JSON: {error}") from None
            if not isinstance(value, dict):
                raise UserError(
                    f"{place}: got a JSON {type(value).__name__}, expected an object with '{field}'"
                )
            if field not in value:
                raise UserError(f"{place}: {_no_field(field, value)}")
            yield Document(self._text(value[field], place), place)

    def _rows(self, file: io.BufferedIOBase) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        field, number = self._reading.text_field, 0
        try:
            # Parquet is read from its end: a compressed one has to be unpacked into memory first.
            whole = self.path.suffix.lower() in COMPRESSIONS
            table = pq.ParquetFile(pa.BufferReader(file.read()) if whole else self.path)
            if field not in table.schema_arrow.names:
                raise UserError(f"{self.path}: {_no_field(field, table.schema_arrow.names)}")
            groups = max(1, table.metadata.num_rows)
            size = self.path.stat().st_size
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    place = f"{self.path}, row {number}"
                    yield Document(self._text(text, place), place)
                self.position = size * number // groups
        except pa.ArrowException as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{self.path}, after row {number}: cannot be read as Parquet: {first}") from None

    def _text(self, value: Any, place: str) -> str:
        """A text field's value; null counts as empty, lone surrogates as bytes that are not UTF-8."""
        if value is None:
            return ""
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"{place}: field '{self._reading.text_field}' holds {kind}, expected a string")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                if self._reading.errors == "strict":
                    code = ord(value[error.start])
                    raise UserError(
                        f"{place}: a lone surrogate (U+{code:04X}), which is not text;"
                        " read it with errors='replace'"
                    ) from None
                return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return value


def _no_field(field: str, names: Iterable[str]) -> str:
    known = ", ".join(sorted(names)) or "none"
    return f"no field '{field}', it has: {known}; name the one with the text (text_field)"


def _safe_cut(text: str) -> int:
    """Where ``text`` can be cut so that the parts encode to what the whole encodes to; 0 if nowhere.

    Before a newline that a word follows: GPT-2's rule for white space keeps that newline apart from the
    white space before it and from the word behind it, so no token ever spans this place.
    """
    cut = text.rfind("\n", 0, len(text) - 1)
    while cut > 0 and text[cut + 1].isspace():
        cut = text.rfind("\n", 0, cut)
    return max(cut, 0)


def decompressed(raw: BinaryIO, path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstandardReader(raw, path), _READ_BYTES)
    assert isinstance(raw, io.BufferedIOBase)
    return raw


class _ZstandardReader(io.RawIOBase):
    """Decompressed bytes of one or more Zstandard frames; raises ``EOFError`` when the last is cut off."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        import zstandard

        self._zstandard = zstandard
        self._raw = raw
        self._path = path
        self._frame: Any = None
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        while not self._plain:
            packed = self._packed or self._raw.read(_READ_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError
                return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._plain = memoryview(self._frame.decompress(packed))
            except self._zstandard.ZstdError as error:
                raise UserError(f"{self._path}: damaged Zstandard data: {error}") from None
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(target), len(self._plain))
        target[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count
