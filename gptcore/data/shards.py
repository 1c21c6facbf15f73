"""Token shards: ids on disk, mapped into memory, that tell when they are damaged.

One file holds the ids of many documents, each followed by the end-of-text id where the tokenizer has one::

    0       4096 bytes of header, its own SHA-256 last
    4096    N ids, uint16 or uint32, little-endian, padded to 8 bytes
            D x uint64: where each document ends, in tokens (end of text included), padded to 8 bytes
            V x uint16: UTF-8 bytes of each id, padded to 8 bytes
            one CRC-32 (uint32) for every MiB of ids

Opening checks the header, the file's size and everything behind the ids. The ids themselves are checked
a MiB at a time, when first read: a shard of any size opens at once, and no damaged id reaches a model.
"""

from __future__ import annotations

import array
import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from gptcore.data.atomic import atomic_file
from gptcore.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from gptcore.data.vocabulary import Tokenizer

SUFFIX = ".tokens"
MAGIC = b"gptcore\0"
VERSION = 1
HEADER_BYTES = 4096  # one page, so that the ids start on a page of their own
BLOCK_BYTES = 1 << 20  # checked in about a millisecond, and 4 bytes of checksum are nothing beside it
# magic, version, bytes per id, tokens, documents, vocabulary, end of text or -1, UTF-8 bytes of the text,
# fingerprint of the tokenizer, SHA-256 of what stands behind the ids
_FIELDS = struct.Struct("<8sIIQQQqQ32s32s")


def _padded(size: int) -> int:
    return -(-size // 8) * 8


class TokenShard:
    """One shard file, read-only. Raises ``UserError`` when it is missing, no shard, truncated or damaged.

    ``tokens``, ``documents``, ``vocab_size``, ``eot`` (None if none), ``text_bytes``, ``fingerprint`` as
    in the header; ``document_ends`` (D,) uint64; ``token_bytes`` (V,) uint16.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import numpy as np

        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                header = file.read(HEADER_BYTES)
        except FileNotFoundError:
            raise UserError(f"no token shard at {self.path}") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        itemsize, trailer_sum = self._read_header(header)
        body = _padded(self.tokens * itemsize)
        self._blocks = -(-self.tokens * itemsize // BLOCK_BYTES)
        ends, lengths = 8 * self.documents, _padded(2 * self.vocab_size)
        expected = HEADER_BYTES + body + ends + lengths + 4 * self._blocks
        if size != expected:
            what = "truncated" if size < expected else "longer than it says"
            raise self._damaged(f"{what}: {size} bytes, expected {expected}")
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r")
        trailer = mapped[HEADER_BYTES + body :]
        if hashlib.sha256(trailer.data).digest() != trailer_sum:
            raise self._damaged("the checksum of its index differs")
        dtype = np.dtype("<u2" if itemsize == 2 else "<u4")
        self._bytes = mapped[HEADER_BYTES : HEADER_BYTES + self.tokens * itemsize]
        self._ids = self._bytes.view(dtype)
        self.document_ends: np.ndarray = trailer[:ends].view("<u8")
        self.token_bytes: np.ndarray = trailer[ends : ends + 2 * self.vocab_size].view("<u2")
        self._checksums = trailer[ends + lengths :].view("<u4")
        self._checked = bytearray(self._blocks)

    def _read_header(self, header: bytes) -> tuple[int, bytes]:
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(f"{self.path}: not a token shard")
        if len(header) < HEADER_BYTES:
            raise self._damaged(f"truncated: {len(header)} bytes, not even a header")
        _, version, itemsize, tokens, documents, vocab_size, eot, text_bytes, fingerprint, trailer_sum = (
            _FIELDS.unpack_from(header)
        )
        if version != VERSION:
            raise UserError(f"{self.path}: shard format {version}, this version of gptcore reads {VERSION}")
        if hashlib.sha256(header[:-32]).digest() != header[-32:]:
            raise self._damaged("the checksum of its header differs")
        self.tokens: int = tokens
        self.documents: int = documents
        self.vocab_size: int = vocab_size
        self.eot: int | None = None if eot < 0 else eot
        self.text_bytes: int = text_bytes
        self.fingerprint: str = fingerprint.hex()
        return itemsize, trailer_sum

    def _damaged(self, how: str) -> UserError:
        return UserError(f"{self.path}: damaged token shard: {how}; prepare the data again")

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from ``start`` to ``stop``, a read-only view; a damaged block raises ``UserError``."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"read: got tokens {start} to {stop}, expected 0 to {self.tokens}")
        itemsize = self._ids.itemsize
        for block in range(start * itemsize // BLOCK_BYTES, -(-stop * itemsize // BLOCK_BYTES)):
            if not self._checked[block]:
                self._check(block)
        return self._ids[start:stop]

    def _check(self, block: int) -> None:
        content = self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        if zlib.crc32(content.data) != self._checksums[block]:
            raise self._damaged(f"the checksum of MiB {block} of its ids differs")
        self._checked[block] = 1

    def verify(self) -> None:
        """Check every id now, rather than when it is first read."""
        self.read(0, self.tokens)


class ArrayShard:
    """Ids in memory behind the face of a shard, for data that needs no file.

    ``ids``: (N,) integers. ``document_ends``: where documents end; default: after every ``eot``, or at the
    end of all. ``token_bytes``: (V,) bytes per id; default none, then batches count no bytes.
    """

    def __init__(
        self,
        ids: Any,
        *,
        vocab_size: int | None = None,
        eot: int | None = None,
        document_ends: Any = None,
        token_bytes: Any = None,
        fingerprint: str = "",
    ) -> None:
        import numpy as np

        self._ids = np.ascontiguousarray(ids)
        if self._ids.ndim != 1 or self._ids.dtype.kind not in "iu":
            raise TypeError(
                f"ArrayShard: ids: got {self._ids.dtype} of {self._ids.ndim} dimensions, expected (N,)"
            )
        smallest, largest = (int(self._ids.min()), int(self._ids.max())) if self._ids.size else (0, -1)
        self.vocab_size = largest + 1 if vocab_size is None else vocab_size
        if largest >= self.vocab_size or smallest < 0:
            raise ValueError(f"ArrayShard: ids: expected 0 to {self.vocab_size - 1}")
        self.tokens = len(self._ids)
        self.eot = eot
        self.fingerprint = fingerprint
        if document_ends is None:
            ends = np.flatnonzero(self._ids == eot) + 1 if eot is not None else np.empty(0, np.int64)
            document_ends = np.union1d(ends, [self.tokens] if self.tokens else [])
        self.document_ends: np.ndarray = np.asarray(document_ends, dtype=np.uint64)
        self.documents = len(self.document_ends)
        lengths = np.zeros(self.vocab_size) if token_bytes is None else token_bytes
        self.token_bytes: np.ndarray = np.asarray(lengths, dtype=np.uint16)
        self.text_bytes = int(self.token_bytes[self._ids].sum(dtype=np.int64))

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from ``start`` to ``stop``, a view."""
        return self._ids[start:stop]


class ShardWriter:
    """Write one shard: it appears at ``path`` when the ``with`` block ends, whole, or not at all."""

    def __init__(self, path: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
        import numpy as np

        self.path = Path(path)
        self.tokens = 0
        self.text_bytes = 0
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._vocab_size = tokenizer.vocab_size
        self._eot = tokenizer.eot
        self._fingerprint = bytes.fromhex(tokenizer.fingerprint)
        self._token_bytes = tokenizer.byte_lengths()
        self._ends = array.array("Q")
        self._open_document = False
        self._buffer = bytearray()
        self._checksums = array.array("I")
        self._stack = ExitStack()
        self._file: BinaryIO

    @property
    def documents(self) -> int:
        """Documents finished so far."""
        return len(self._ends)

    def __enter__(self) -> ShardWriter:
        self._file = self._stack.enter_context(atomic_file(self.path))
        self._file.seek(HEADER_BYTES)
        return self

    def append(self, ids: Sequence[int] | np.ndarray, *, ends: bool = True) -> None:
        """Add a document, or with ``ends=False`` the first part of one that the next call continues."""
        import numpy as np

        wide = np.asarray(ids, dtype=np.int64)
        if wide.ndim != 1:
            raise ValueError(f"append: got ids of {wide.ndim} dimensions, expected one")
        if wide.size and not (int(wide.min()) >= 0 and int(wide.max()) < self._vocab_size):
            raise ValueError(f"append: got an id outside 0 to {self._vocab_size - 1}")
        self._write(wide.astype(self._dtype).tobytes())
        self.tokens += wide.size
        self.text_bytes += int(self._token_bytes[wide].sum(dtype=np.int64))
        self._open_document = True
        if ends:
            self._end_document()

    def _end_document(self) -> None:
        if self._eot is not None:
            self._write(self._eot.to_bytes(self._dtype.itemsize, "little"))
            self.tokens += 1
        self._ends.append(self.tokens)
        self._open_document = False

    def _write(self, content: bytes) -> None:
        self._buffer += content
        while len(self._buffer) >= BLOCK_BYTES:
            self._write_block(bytes(self._buffer[:BLOCK_BYTES]))
            del self._buffer[:BLOCK_BYTES]

    def _write_block(self, block: bytes) -> None:
        self._file.write(block)
        self._checksums.append(zlib.crc32(block))

    def _finish(self) -> None:
        if self._open_document:
            self._end_document()
        if self._buffer:
            self._write_block(bytes(self._buffer))
        ids = self.tokens * self._dtype.itemsize
        self._file.write(bytes(_padded(ids) - ids))
        lengths = self._token_bytes.astype("<u2").tobytes()
        trailer = b"".join(
            [
                _little_endian(self._ends, "<u8"),
                lengths.ljust(_padded(len(lengths)), b"\0"),
                _little_endian(self._checksums, "<u4"),
            ]
        )
        self._file.write(trailer)
        header = _FIELDS.pack(
            MAGIC, VERSION, self._dtype.itemsize, self.tokens, len(self._ends), self._vocab_size,
            -1 if self._eot is None else self._eot, self.text_bytes, self._fingerprint,
            hashlib.sha256(trailer).digest(),
        ).ljust(HEADER_BYTES - 32, b"\0")  # fmt: skip
        self._file.seek(0)
        self._file.write(header + hashlib.sha256(header).digest())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()


def _little_endian(values: array.array[int], dtype: str) -> bytes:
    import numpy as np

    return np.asarray(values).astype(dtype).tobytes()
