"""A process's place in a process group, and what its ranks must agree on before they exchange anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as c10d


class Member(NamedTuple):
    """This process in ``group``: rank ``rank`` of ``ranks``."""

    group: Any
    rank: int
    ranks: int


def member_of(call: str, group: Any = None) -> Member:
    """This process's place in ``group``, None being all processes.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a group that this process is not in.
    """
    if not (c10d.is_available() and c10d.is_initialized()):
        raise RuntimeError(
            f"{call}: argument 'group': torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first, in a program started by torchrun"
        )
    if group is None:
        group = c10d.group.WORLD
    if not isinstance(group, c10d.ProcessGroup) or c10d.get_rank(group) < 0:
        raise ValueError(
            f"{call}: argument 'group': got {group!r} in process {c10d.get_rank()}, expected a process group that "
            "this process is in"
        )
    return Member(group, c10d.get_rank(group), c10d.get_world_size(group))


def agree(
    call: str,
    member: Member,
    same: Mapping[str, int],
    own: Sequence[int] = (),
    error: Exception | None = None,
) -> list[list[int]]:
    """Every rank's ``own`` numbers, after all ranks said that they can go on and found ``same`` equal.

    A rank that cannot go on calls it too, with its ``error``: then every rank raises, where otherwise the others
    would wait for it in the next collective.

    Raises:
        ``error`` on the rank that has one.
        ValueError: elsewhere, naming that rank; on all ranks, where ``same`` differs, naming what does.
    """
    numbers = torch.tensor([int(error is None), *same.values(), *own], dtype=torch.int64)
    table = numbers.new_empty(member.ranks, len(numbers))
    c10d.all_gather(list(table.unbind()), numbers, group=member.group)
    rows = table.tolist()
    if error is not None:
        raise error
    for rank, (ready, *_) in enumerate(rows):
        if not ready:
            raise ValueError(
                f"{call}: rank {rank} of the group refused its arguments; its own error says why"
            )
    refuse_difference(call, [dict(zip(same, row[1:], strict=False)) for row in rows])
    return [row[1 + len(same) :] for row in rows]


def gather_numbers(own: Sequence[float], member: Member) -> list[float]:
    """All ranks' numbers one after the other, as many of each; on every rank."""
    if member.ranks == 1:
        return list(own)
    numbers = torch.tensor(own, dtype=torch.float64)
    table = numbers.new_empty(member.ranks, len(numbers))
    c10d.all_gather(list(table.unbind()), numbers, group=member.group)
    return table.reshape(-1).tolist()


def refuse_difference(call: str, facts: Sequence[Mapping[str, Any]]) -> None:
    """ValueError that names the first fact in which a rank differs from rank 0."""
    for rank, other in enumerate(facts):
        for name in [*facts[0], *other]:
            first, second = facts[0].get(name, "nothing"), other.get(name, "nothing")
            if first != second:
                raise ValueError(
                    f"{call}: got {name} = {first} on rank 0 and {second} on rank {rank}, expected the same on all "
                    "ranks of the group"
                )
