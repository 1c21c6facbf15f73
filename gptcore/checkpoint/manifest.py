"""What a checkpoint says of itself: every tensor's dtype, shape and pieces, every file's size, and the state.

``manifest.json`` begins with the digest of all that follows it, so that a flip anywhere in it is found; it holds the
digests of the shards' headers and checksums of every piece, so that a flip in them is found too, and a shard of another
checkpoint is told from its own.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptcore import __version__
from gptcore.checkpoint import checksum
from gptcore.checkpoint.safetensors_file import DTYPES
from gptcore.errors import UserError

FORMAT = "gptcore-checkpoint-3"
_READABLE = (FORMAT, "gptcore-checkpoint-2")  # whose pieces all have SHA-256
MANIFEST = "manifest.json"
_OPENING = '{"sha256": "%s",'


class CheckpointError(UserError):
    """A checkpoint that cannot be written or does not hold what it held when it was written."""


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` - 1 of a tensor, counted flat: tensor ``key`` in the file of ``shard``.

    ``checksum`` is of its bytes, by the ``algorithm`` of that name in :mod:`gptcore.checkpoint.checksum`.
    """

    shard: int
    key: str
    start: int
    stop: int
    algorithm: str
    checksum: str


class Whole(NamedTuple):
    """A tensor by its safetensors dtype, its shape, and the pieces that make it, ascending."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


class ShardFile(NamedTuple):
    """One file: its name, its size in bytes, the digest of all that comes before the tensors."""

    file: str
    nbytes: int
    header_sha256: str


class Part(NamedTuple):
    """What one rank wrote: its file, and by tensor dtype, shape and pieces."""

    file: ShardFile
    tensors: dict[str, Whole]

    def to_bytes(self) -> bytes:
        return json.dumps({"file": self.file._asdict(), "tensors": _plain(self.tensors)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Part:
        values = json.loads(data)
        return cls(ShardFile(**values["file"]), _tensors(values["tensors"]))


@dataclass(frozen=True)
class Manifest:
    """All of ``manifest.json``. ``attempt`` names the save that made it; ``state`` is the caller's, with ``step``."""

    attempt: str
    state: dict[str, Any]
    versions: dict[str, str]
    shards: tuple[ShardFile, ...]
    tensors: dict[str, Whole]

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "attempt": self.attempt,
            "state": self.state,
            "versions": self.versions,
            "shards": [shard._asdict() for shard in self.shards],
            "tensors": _plain(self.tensors),
        }
        text = json.dumps(body, allow_nan=False)[1:]
        return (_OPENING % hashlib.sha256(text.encode()).hexdigest() + text).encode()


def read_manifest(path: Path) -> Manifest:
    """The verified manifest of the checkpoint directory ``path``.

    Raises:
        CheckpointError: no directory, no manifest in it, or one that is corrupt or of something else.
    """
    try:
        data = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_dir():
            raise CheckpointError(f"no checkpoint at {path}") from error
        raise CheckpointError(f"checkpoint {path} is incomplete: it has no {MANIFEST}") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    opening = _OPENING % ("0" * 64)
    text = data[len(opening) :]
    if data[: len(opening)] != (_OPENING % hashlib.sha256(text).hexdigest()).encode():
        raise CheckpointError(f"checkpoint {path} is corrupt: {MANIFEST} fails its checksum")
    body = json.loads(b"{" + text)
    if body.get("format") not in _READABLE:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}")
    shards = tuple(ShardFile(**shard) for shard in body["shards"])
    return Manifest(body["attempt"], body["state"], body["versions"], shards, _tensors(body["tensors"]))


def merge(parts: Sequence[Part]) -> dict[str, Whole]:
    """The tensors of all ranks, each from its pieces.

    Raises:
        CheckpointError: ranks that differ in a tensor's dtype or shape, elements that no rank passed or two did.
    """
    found: dict[str, list[Whole]] = {}
    for part in parts:
        for name, whole in part.tensors.items():
            found.setdefault(name, []).append(whole)
    return {name: _joined(name, found[name]) for name in sorted(found)}


def _joined(name: str, claims: Sequence[Whole]) -> Whole:
    dtype, shape, _ = claims[0]
    for claim in claims:
        if (claim.dtype, claim.shape) != (dtype, shape):
            raise CheckpointError(
                f"tensor '{name}' is {dtype} {list(shape)} on one rank and {claim.dtype} {list(claim.shape)} on another"
            )
    pieces = sorted((piece for claim in claims for piece in claim.pieces), key=lambda piece: piece.start)
    reached = 0
    for piece in pieces:
        if piece.start != reached:
            first, last = sorted((piece.start, reached))
            how = "no rank" if piece.start > reached else "more than one rank"
            raise CheckpointError(f"tensor '{name}': elements from {first} to {last} were passed by {how}")
        reached = piece.stop
    numel = torch.Size(shape).numel()
    if reached != numel:
        raise CheckpointError(f"tensor '{name}': elements from {reached} to {numel} were passed by no rank")
    return Whole(dtype, shape, tuple(pieces))


def versions() -> dict[str, str]:
    """Of what makes a checkpoint."""
    return {"gptcore": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _plain(tensors: Mapping[str, Whole]) -> dict[str, Any]:
    return {
        name: {"dtype": w.dtype, "shape": w.shape, "pieces": [_plain_piece(piece) for piece in w.pieces]}
        for name, w in tensors.items()
    }


def _tensors(values: Mapping[str, Any]) -> dict[str, Whole]:
    return {name: Whole(v["dtype"], tuple(v["shape"]), _pieces(v["pieces"])) for name, v in values.items()}


def _plain_piece(piece: Piece) -> dict[str, Any]:
    *place, algorithm, text = piece
    return {**dict(zip(Piece._fields, place, strict=False)), algorithm: text}


def _pieces(values: Iterable[Mapping[str, Any]]) -> tuple[Piece, ...]:
    """Of pieces whose checksum stands under its algorithm's name."""
    return tuple(
        Piece(value["shard"], value["key"], value["start"], value["stop"], name, value[name])
        for value in values
        for name in checksum.NAMES
        if name in value
    )
