"""Who owns which slice, and whole state from slices: a checkpoint knows nothing of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore.dist.collectives import gather_rows
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


def full_state_dict(module: torch.nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with whole tensors, as the model had it in one process; every rank gets all of it.

    Every rank of the group calls it.
    """
    state = dict(module.state_dict())
    with torch.no_grad():
        for name, shard in sharded_parameters(module).items():
            state[name] = gather_rows(state[name], shard.sizes, shard.member)
    return state


def load_full_state_dict(
    module: torch.nn.Module, state: Mapping[str, Tensor], *, strict: bool = True
) -> None:
    """Load what :func:`full_state_dict` gave, or a model in one process, each rank its slices.

    Raises:
        ValueError: a tensor whose first dimension is not that of the whole; nothing is loaded then.
        RuntimeError: as ``load_state_dict`` has it.
    """
    own = dict(state)
    for name, shard in sharded_parameters(module).items():
        if name not in own:
            continue
        if own[name].dim() == 0 or own[name].shape[0] != shard.total:
            raise ValueError(
                f"load_full_state_dict: '{name}': got shape {tuple(own[name].shape)}, expected the whole of "
                f"{shard.total} along the first dimension"
            )
        own[name] = own[name][shard.start : shard.stop]
    module.load_state_dict(own, strict=strict)
