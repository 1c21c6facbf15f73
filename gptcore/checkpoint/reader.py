"""Reading a checkpoint: whole tensors and ranges of them, from however many files hold them, verified.

Files are memory-mapped, so that the ranks of a machine share what one of them read; what is returned is copied out of
the map. Reading a map of a file that was truncated would kill the process, so sizes are compared first.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from gptcore.checkpoint.checksum import checksum
from gptcore.checkpoint.manifest import CheckpointError, Manifest, Piece, ShardFile, read_manifest
from gptcore.checkpoint.safetensors_file import DTYPES, Placed, bytes_of, header_length, parse_header


class Checkpoint:
    """One checkpoint, open for reading: its manifest is verified, its files are mapped when they are first needed.

    Safe to use from several threads. The maps stay when the checkpoint is pruned meanwhile.

    Raises:
        CheckpointError: no checkpoint at ``path``, or a corrupt or missing manifest.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._maps: dict[int, _Mapped] = {}

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state, with ``step``."""
        return self.manifest.state

    @property
    def step(self) -> int:
        return int(self.manifest.state["step"])

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return list(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.manifest.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.manifest.tensors[name].dtype]

    def nbytes(self, name: str) -> int:
        return self.manifest.tensors[name].nbytes

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, *, verify: bool | None = None
    ) -> Tensor:
        """Tensor ``name`` on the CPU; with ``start`` or ``stop``, those of its elements, counted flat.

        Args:
            start, stop: from the first to the element behind the last; None: from the beginning, to the end.
            verify: compare the checksums of all pieces that are touched; None: those of a whole tensor. A range's
                pieces may be much longer than the range.

        Returns:
            The whole in its shape, or (stop - start,).

        Raises:
            CheckpointError: a file that is missing, truncated or not the one that was saved; a failed checksum.
            KeyError: no tensor of that name. ValueError: a range that is not within the tensor.
        """
        whole = self.manifest.tensors[name]
        is_range = start is not None or stop is not None
        begin, end = start or 0, whole.numel if stop is None else stop
        if not 0 <= begin <= end <= whole.numel:
            raise ValueError(
                f"checkpoint.read: '{name}': got elements {begin} to {end}, expected a range within the {whole.numel}"
            )
        out = torch.empty(end - begin, dtype=DTYPES[whole.dtype])
        view, width = numpy.frombuffer(bytes_of(out), numpy.uint8), out.element_size()
        for piece in whole.pieces:
            first, last = max(begin, piece.start), min(end, piece.stop)
            if first >= last:
                continue
            source, target = self._bytes(piece), view[(first - begin) * width : (last - begin) * width]
            verifies = not is_range if verify is None else verify
            if verifies and (first, last) == (piece.start, piece.stop):
                self._compare(name, piece, source, target)  # and copy, in one pass
                continue
            if verifies:
                self._compare(name, piece, source)
            target[:] = source[(first - piece.start) * width : (last - piece.start) * width]
        return out if is_range else out.view(whole.shape)

    def read_all(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The whole tensors ``names``, verified."""
        return {name: self.read(name) for name in names}

    def file_problems(self) -> list[str]:
        """A sentence for every file that is missing, truncated, or has a header that fails its checksum."""
        return [str(error) for index in range(len(self.manifest.shards)) if (error := self._refusal(index))]

    def problems(self, name: str) -> list[str]:
        """A sentence for every piece of tensor ``name`` that fails its checksum, or whose file is damaged."""
        found = []
        for piece in self.manifest.tensors[name].pieces:
            try:
                self._compare(name, piece, self._bytes(piece))
            except CheckpointError as error:
                found.append(str(error))
        return found

    def verify(self, names: Sequence[str] | None = None) -> None:
        """Compare all files' sizes and headers, and every checksum of ``names`` (all).

        Raises:
            CheckpointError: says everything that is damaged.
        """
        found = self.file_problems()
        for name in self.names if names is None else names:
            found += self.problems(name)
        if found:
            raise CheckpointError("; ".join(dict.fromkeys(found)))

    def _refusal(self, index: int) -> CheckpointError | None:
        try:
            self._map(index)
        except CheckpointError as error:
            return error
        return None

    def _bytes(self, piece: Piece) -> numpy.ndarray:
        mapped = self._map(piece.shard)
        placed = mapped.placed[piece.key]
        return numpy.asarray(mapped.data[mapped.header + placed.begin : mapped.header + placed.end])

    def _compare(
        self, name: str, piece: Piece, data: numpy.ndarray, copy: numpy.ndarray | None = None
    ) -> None:
        if checksum(piece.algorithm, data, copy) != piece.checksum:
            file = self.manifest.shards[piece.shard].file
            raise CheckpointError(
                f"checkpoint {self.path} is corrupt: tensor '{name}' fails its checksum in {file}"
            )

    def _map(self, index: int) -> _Mapped:
        if index not in self._maps:
            self._maps[index] = _mapped(self.path, self.manifest.shards[index])
        return self._maps[index]


class _Mapped(NamedTuple):
    """A file's bytes, how many of them come before the tensors, and where each tensor lies behind those."""

    data: memoryview
    header: int
    placed: dict[str, Placed]


def _mapped(path: Path, shard: ShardFile) -> _Mapped:
    try:
        descriptor = os.open(path / shard.file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {shard.file}: {error.strerror}") from error
    try:
        size = os.fstat(descriptor).st_size
        if size != shard.nbytes:
            raise CheckpointError(
                f"checkpoint {path} is truncated or corrupt: {shard.file} has {size} bytes, expected {shard.nbytes}"
            )
        data = memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
    header = data[: min(header_length(data[:8]), size)]
    if hashlib.sha256(header).hexdigest() != shard.header_sha256:
        raise CheckpointError(f"checkpoint {path} is corrupt: the header of {shard.file} fails its checksum")
    return _Mapped(data, len(header), parse_header(bytes(header)))
