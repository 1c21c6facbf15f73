"""States of all ranks' slices as one ``state_dict``, that of one process, and slices of such a dict again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.dist.group import Member
from gptcore.optim import zero_state
from gptcore.optim.zero_layout import Owned
from gptcore.optim.zero_state import Parts, Sliced


def gathered(optimizer: Sliced, member: Member, numbers: Mapping[str, int]) -> dict[int, dict[str, Tensor]]:
    """By parameter's number the states of all of it, in host memory; every rank calls it.

    Args:
        numbers: by parameter's name the one that the whole dict has for it.
    """
    states: dict[int, dict[str, Tensor]] = {number: {} for number in sorted(numbers.values())}
    for name, value in _joined(zero_state.states(optimizer), member).items():
        parameter, _, key = name.rpartition("/")
        states[numbers[parameter]][key] = value
    return {number: values for number, values in states.items() if values}


def slices(
    optimizer: Sliced, numbers: Mapping[str, int], states: Mapping[int, Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Of whole states what the wrapped optimizer has, by its own numbers.

    Raises:
        ValueError: a state of another shape than its parameter's.
    """
    index = zero_state.indices(optimizer)
    found: dict[int, dict[str, Any]] = {}
    for owned in optimizer.owned(whole_parts=True):
        whole = states.get(numbers[owned.name], {})
        if whole:
            found[index[owned.part]] = {
                key: _slice(optimizer, key, value, owned) for key, value in whole.items()
            }
    return found


def _slice(optimizer: Sliced, key: str, value: Any, owned: Owned) -> Any:
    if not isinstance(value, Tensor):
        return value
    place = zero_state.place_of(optimizer, key, owned)
    if value.shape != place.shape:
        raise ValueError(
            f"ZeroOptimizer.load_state_dict: argument 'state_dict': got '{key}' of shape {tuple(value.shape)} for "
            f"'{owned.name}', expected {place.shape}"
        )
    return value.reshape(-1)[place.start : place.stop].reshape(place.kept)


def _joined(parts: Parts, member: Member) -> dict[str, Tensor]:
    """The wholes of all ranks' parts: each rank in turn sends its own to their places."""
    own = [(name, part) for name, of_name in parts.items() for part in of_name]
    told = [(name, p.start, p.tensor.numel(), p.tensor.dtype, p.shape) for name, p in own]
    of_ranks: list[Any] = [told]
    if member.ranks > 1:
        of_ranks = [None] * member.ranks
        c10d.all_gather_object(of_ranks, told, group=member.group)
    wholes: dict[str, Tensor] = {}
    for rank, entries in enumerate(of_ranks):
        for i, (name, start, count, dtype, shape) in enumerate(entries):
            if name not in wholes:
                wholes[name] = torch.empty(shape, dtype=dtype)
            place = wholes[name].view(-1)[start : start + count]
            if rank == member.rank:
                place.copy_(own[i][1].tensor)
            if member.ranks > 1:
                _broadcast(place, rank, member)
    return wholes


def _broadcast(place: Tensor, rank: int, member: Member) -> None:
    """From ``rank``, through the device of the group's backend."""
    nccl = c10d.get_backend(member.group) == "nccl"
    carrier = place.cuda() if nccl else place
    c10d.broadcast(carrier, c10d.get_global_rank(member.group, rank), group=member.group)
    if nccl:
        place.copy_(carrier)
