"""Which pieces of a tensor each rank has, where it is cut along one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore.dist.collectives import gather_rows
from gptcore.dist.group import Member

Piece = tuple[int, int]


@dataclass(frozen=True)
class TensorShard:
    """A tensor of ``total`` things along dimension ``dim``, of which rank r has ``pieces[r]`` side by side.

    A piece is (start, stop) in the whole. A rank may have several, as of a fused projection to queries, keys and
    values, and several ranks may have the same one, whose contents are then equal. A module with an attribute
    ``tensor_shards`` says so of its own parameters, by name.
    """

    member: Member
    dim: int
    total: int
    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def own(self) -> tuple[Piece, ...]:
        """This rank's pieces."""
        return self.pieces[self.member.rank]

    @property
    def sizes(self) -> list[int]:
        """How many things each rank has."""
        return [sum(stop - start for start, stop in pieces) for pieces in self.pieces]

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of ``whole``, in memory of its own."""
        part = whole.new_empty(self._shape(whole, self.sizes[self.member.rank]))
        at = 0
        for start, stop in self.own:  # torch.cat would import seconds of Python for the meta device
            part.narrow(self.dim, at, stop - start).copy_(whole.narrow(self.dim, start, stop - start))
            at += stop - start
        return part

    def gather(self, part: Tensor) -> Tensor:
        """The whole, from all ranks' parts; every rank calls it."""
        shapes = [self._shape(part, size) for size in self.sizes]
        lengths = [torch.Size(shape).numel() for shape in shapes]
        flat = gather_rows(part.detach().reshape(-1), lengths, self.member)
        parts = [one.view(shape) for one, shape in zip(flat.split(lengths), shapes, strict=True)]
        return self.joined(parts)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of all ranks' parts."""
        whole = parts[0].new_empty(self._shape(parts[0], self.total))
        for pieces, part in zip(self.pieces, parts, strict=True):
            at = 0
            for start, stop in pieces:
                size = stop - start
                whole.narrow(self.dim, start, size).copy_(part.narrow(self.dim, at, size))
                at += size
        return whole

    def _shape(self, like: Tensor, size: int) -> list[int]:
        """That of ``like`` with ``size`` things along the dimension that is cut."""
        return [*like.shape[: self.dim], size, *like.shape[self.dim + 1 :]]

    @property
    def is_first_with_its_own(self) -> bool:
        """Whether no rank before this one has any of its pieces."""
        before = {piece for pieces in self.pieces[: self.member.rank] for piece in pieces}
        return before.isdisjoint(self.own)

    def counted_here(self, part: Tensor) -> list[Tensor]:
        """Views of what no rank before this one has too: over all ranks everything once."""
        elsewhere = {piece for pieces in self.pieces[: self.member.rank] for piece in pieces}
        views, at = [], 0
        for start, stop in self.own:
            if (start, stop) not in elsewhere:
                views.append(part.narrow(self.dim, at, stop - start))
            at += stop - start
        return [part] if len(views) == len(self.own) else views

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorShard:
        return self  # a copied module is in the same process group


def cut_parameter(module: torch.nn.Module, name: str, shard: TensorShard) -> None:
    """Keep of the parameter ``name`` this rank's pieces, in a parameter of their own."""
    whole = getattr(module, name)
    part = torch.nn.Parameter(shard.take(whole.detach()), requires_grad=whole.requires_grad)
    setattr(module, name, part)
    module.__dict__.setdefault("tensor_shards", {})[name] = shard


def shard_of(module: torch.nn.Module, name: str) -> TensorShard:
    """That of the cut parameter ``name`` of ``module``."""
    shards: dict[str, TensorShard] = module.__dict__["tensor_shards"]
    return shards[name]


def tensor_shards(module: torch.nn.Module) -> dict[str, TensorShard]:
    """The pieces of every parameter that is cut so, by name."""
    found = {}
    for prefix, part in module.named_modules():
        shards: dict[str, TensorShard] = getattr(part, "tensor_shards", {})
        for name, shard in shards.items():
            found[f"{prefix}.{name}" if prefix else name] = shard
    return found
