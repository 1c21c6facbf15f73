"""Who owns which slice of the layers of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gptcore.dist.group import Member


@dataclass(frozen=True)
class Shard:
    """The slice of ``total`` things that a rank has: ``start`` to ``stop`` - 1.

    A module with an attribute ``shard`` keeps of all its own parameters this slice along dimension 0. Rank r has
    ``bounds[r]`` to ``bounds[r + 1]`` - 1; where the ranks don't divide ``total``, the first ones have one more.
    """

    member: Member
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, total: int, member: Member) -> Shard:
        each, more = divmod(total, member.ranks)
        return cls(member, tuple(rank * each + min(rank, more) for rank in range(member.ranks + 1)))

    @property
    def start(self) -> int:
        return self.bounds[self.member.rank]

    @property
    def stop(self) -> int:
        return self.bounds[self.member.rank + 1]

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def sizes(self) -> list[int]:
        """How many each rank has."""
        return [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # a copied module is in the same process group


def sharded_parameters(module: torch.nn.Module) -> dict[str, Shard]:
    """The slice of every parameter that is not whole here, by name."""
    found = {}
    for prefix, part in module.named_modules():
        shard = getattr(part, "shard", None)
        if isinstance(shard, Shard):
            for name, _ in part.named_parameters(recurse=False):
                found[f"{prefix}.{name}" if prefix else name] = shard
    return found
