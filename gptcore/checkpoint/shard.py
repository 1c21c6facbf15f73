"""What one rank writes: the tensors and slices that it owns, laid out as one safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gptcore.checkpoint.checksum import CRC32C, as_text
from gptcore.checkpoint.direct_file import AT_ONCE, BLOCK, DirectFile, blocks
from gptcore.checkpoint.manifest import FORMAT, Part, Piece, ShardFile, Whole
from gptcore.checkpoint.safetensors_file import dtype_name, flat_bytes, header_of, place
from gptcore.ops.crc32c import crc32c

# Bytes of a deferred tensor that are in memory at a time.
_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class Slice:
    """Some consecutive elements of a tensor of ``shape``, from element ``start``, counted flat in row-major order.

    ``tensor``: those elements, one dimension, any strides and device.
    """

    tensor: Tensor
    start: int
    shape: Sequence[int]


@dataclass(frozen=True)
class Deferred:
    """A tensor that is read when it is written: ``read(i, j)`` gives elements i to j - 1, counted flat, on the CPU."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    is_cuda = False

    def numel(self) -> int:
        return torch.Size(self.shape).numel()


Owned: TypeAlias = Tensor | Slice | Sequence[Slice]


class _Own(NamedTuple):
    """``tensor`` holds the elements of tensor ``name`` from ``start``; the whole is of ``shape``."""

    name: str
    start: int
    shape: tuple[int, ...]
    tensor: Tensor | Deferred

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @property
    def key(self) -> str:
        """In the file. A whole tensor goes by its name, so that any reader of safetensors has it."""
        return self.name if self.is_whole else f"{self.name}[{self.start}:{self.stop}]"

    @property
    def is_whole(self) -> bool:
        return self.tensor.numel() == torch.Size(self.shape).numel()

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing of a tensor that has something."""
        return not self.tensor.numel() and not self.is_whole


class Shard:
    """Rank ``index``'s part of a checkpoint of ``count`` ranks.

    Raises:
        ValueError: a dtype that the format lacks, a tensor without memory of its own, a slice that is not of its whole.
    """

    def __init__(self, tensors: Mapping[str, Owned], index: int = 0, count: int = 1) -> None:
        self.index = index
        self.file = f"shard-{index:05d}-of-{count:05d}.safetensors"
        self._lay_out([own for name, value in tensors.items() for own in _owned(name, value)])

    @classmethod
    def deferred(
        cls, pieces: Sequence[tuple[str, int, Sequence[int], Deferred]], index: int, count: int
    ) -> Shard:
        """A part of pieces that are not in memory: of each the tensor's name, the first element, the whole's shape."""
        shard = cls({}, index, count)
        shard._lay_out([_Own(name, start, tuple(shape), piece) for name, start, shape, piece in pieces])
        return shard

    def _lay_out(self, owned: Sequence[_Own]) -> None:
        self._wholes = {own.name: (dtype_name(own.tensor.dtype), own.shape) for own in owned}
        self._own = {own.key: own for own in owned if not own.is_empty}
        layout = {
            key: (own.tensor.dtype, own.shape if own.is_whole else (own.tensor.numel(),))
            for key, own in self._own.items()
        }
        self._placed = place(layout)
        self.nbytes = self._placed[-1].end if self._placed else 0
        self.size = len(self._header("0" * 16)) + self.nbytes  # of the file
        self.on_cuda = any(own.tensor.is_cuda for own in owned)

    def snapshot(self, room: Tensor, attempt: str) -> Snapshot:
        """The file as it will be, in ``room`` (``blocks`` of ``size`` or more bytes)."""
        header = self._header(attempt)
        room[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        checksums: dict[str, int | None] = {}
        for key, dtype, _, begin, end in self._placed:
            tensor, part = self._own[key].tensor, room[len(header) + begin : len(header) + end]
            assert isinstance(tensor, Tensor)
            if tensor.is_cuda or not tensor.is_contiguous():
                part.view(dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
                checksums[key] = None
            else:
                checksums[key] = crc32c(flat_bytes(tensor), out=part)
        if self.on_cuda:
            torch.cuda.synchronize()
        return Snapshot(room, checksums)

    def write(self, file: DirectFile, attempt: str, snapshot: Snapshot | None = None) -> Part:
        """Write the file, from ``snapshot`` if there is one, else from the tensors, and say what it holds."""
        header = self._header(attempt)
        if snapshot is None:
            checksums = self._pour(file, header)
        else:
            file.write(snapshot.room[: -(-self.size // BLOCK) * BLOCK])
            checksums = self._completed(snapshot, len(header))
        pieces: dict[str, list[Piece]] = {name: [] for name in self._wholes}
        for key, own in self._own.items():
            piece = Piece(self.index, key, own.start, own.stop, CRC32C, as_text(checksums[key]))
            pieces[own.name].append(piece)
        held = {name: Whole(*self._wholes[name], tuple(found)) for name, found in pieces.items()}
        return Part(ShardFile(self.file, self.size, hashlib.sha256(header).hexdigest()), held)

    def _header(self, attempt: str) -> bytes:
        return header_of(self._placed, {"format": FORMAT, "attempt": attempt})

    def _pour(self, file: DirectFile, header: bytes) -> dict[str, int]:
        poured = _Poured(file)
        poured.take(torch.frombuffer(bytearray(header), dtype=torch.uint8), 0)
        checksums = {}
        for placed in self._placed:
            crc = 0
            for tensor in _in_memory(self._own[placed.key].tensor):
                crc = poured.take(flat_bytes(tensor), crc)
            checksums[placed.key] = crc
        poured.end()
        return checksums

    def _completed(self, snapshot: Snapshot, header: int) -> dict[str, int]:
        """The checksums of a snapshot, with those that were left for the thread that writes it."""
        made = {}
        for key, _, _, begin, end in self._placed:
            known = snapshot.checksums[key]
            made[key] = crc32c(snapshot.room[header + begin : header + end]) if known is None else known
        return made


class Snapshot(NamedTuple):
    """A shard's file in memory, and the CRC-32C of its tensors by key, where the copy made it."""

    room: Tensor
    checksums: dict[str, int | None]


class _Poured:
    """Bytes that go into whole blocks, and those into a file."""

    def __init__(self, file: DirectFile) -> None:
        self._file, self._room, self._filled = file, blocks(AT_ONCE), 0

    def take(self, data: Tensor, crc: int) -> int:
        """Append ``data``; ``crc`` with it."""
        while data.numel():
            part = data[: self._room.numel() - self._filled]
            crc = crc32c(part, crc, out=self._room[self._filled : self._filled + part.numel()])
            self._filled += part.numel()
            if self._filled == self._room.numel():
                self._file.write(self._room)
                self._filled = 0
            data = data[part.numel() :]
        return crc

    def end(self) -> None:
        """The last blocks, filled up with what is there."""
        self._file.write(self._room[: -(-self._filled // BLOCK) * BLOCK])


def _in_memory(tensor: Tensor | Deferred) -> Iterator[Tensor]:
    """The elements in order, contiguous on the CPU."""
    if isinstance(tensor, Tensor):
        yield tensor.to("cpu").contiguous()
        return
    step = max(1, _AT_ONCE // tensor.dtype.itemsize)
    for start in range(0, tensor.numel(), step):
        yield tensor.read(start, min(start + step, tensor.numel()))


def _owned(name: str, value: Owned) -> list[_Own]:
    if isinstance(value, Tensor):
        return [_Own(name, 0, tuple(value.shape), _with_memory(name, value))]
    slices = [value] if isinstance(value, Slice) else list(value)
    owned = [_Own(name, s.start, tuple(s.shape), _with_memory(name, s.tensor)) for s in slices]
    for own, given in zip(owned, slices, strict=True):
        numel = torch.Size(own.shape).numel()
        if given.tensor.dim() != 1 or own.start < 0 or own.stop > numel:
            raise ValueError(
                f"checkpoint.save: argument 'tensors': '{name}': got a slice of shape {tuple(given.tensor.shape)} from "
                f"{own.start}, expected one dimension within the {numel} elements of {own.shape}"
            )
        if own.shape != owned[0].shape or own.tensor.dtype != owned[0].tensor.dtype:
            raise ValueError(
                f"checkpoint.save: argument 'tensors': '{name}': got slices of {owned[0].shape} in "
                f"{owned[0].tensor.dtype} and of {own.shape} in {own.tensor.dtype}, expected those of one tensor"
            )
    return owned


def _with_memory(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.layout != torch.strided or hasattr(tensor, "to_local"):
        kind = "a tensor on meta" if tensor.is_meta else type(tensor).__name__
        raise ValueError(
            f"checkpoint.save: argument 'tensors': '{name}': got {kind}, {tensor.layout}, expected a dense tensor with "
            "its elements in this process"
        )
    return tensor.detach()
