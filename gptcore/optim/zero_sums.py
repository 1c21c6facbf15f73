"""Sums over the slices of all ranks, with the same bits however many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.dist.flat_unit import BLOCK
from gptcore.dist.group import Member, gather_numbers
from gptcore.optim.adafactor import Adafactor
from gptcore.optim.slices import BlockSums, Whole, join_blocks


def norm_of_all(gradients: Sequence[Tensor], scale: float, *members: Member) -> tuple[float, bool]:
    """The norm over ``scale`` of all ranks' gradients, and whether one of them is not finite; slices of ``BLOCK``s.

    ``members``: the groups over which they are, one after the other, as the dimensions of a mesh.
    """
    from gptcore.ops.grad_norm import square_sums

    sums, found_inf = square_sums(gradients, BLOCK)
    terms: list[float] = [*_exact_terms(sums.tolist())]
    for member in members:
        if member.ranks > 1:
            numbers = gather_numbers([*_exact_terms(terms), float(found_inf)], member)
            found_inf = any(numbers[3::4])
            terms = [number for i, number in enumerate(numbers) if i % 4 < 3]
    return math.nan if found_inf else math.sqrt(math.fsum(terms)) / scale, found_inf


def _exact_terms(values: Sequence[float]) -> tuple[float, float, float]:
    """Three numbers whose sum is that of ``values`` to more than 150 bits: what is added to it can be in any order."""
    terms: list[float] = []
    for _ in range(3):
        rest = math.fsum((*values, *(-term for term in terms)))
        terms.append(rest if math.isfinite(rest) else 0.0)
    return terms[0], terms[1], terms[2]


def step_in_phases(optimizer: Adafactor, norm: float, scale: float, member: Member) -> None:
    """A step of Adafactor, whose sums over whole matrices are of several owners' blocks."""
    phases = optimizer.step_phases(grad_norm=(norm, False), grad_scale=scale)
    with suppress(StopIteration):
        own = next(phases)
        while True:
            own = phases.send(_blocks_of_all(own, member))


def _blocks_of_all(own: list[BlockSums], member: Member) -> list[Tensor]:
    """For each entry the sums of all blocks of its parameter."""
    told = [(b.whole.number, b.first, b.count, tuple(b.values.shape), b.values.device.type) for b in own]
    of_ranks: list[Any] = [None] * member.ranks
    c10d.all_gather_object(of_ranks, told, group=member.group)
    sizes = [[math.prod(shape) for *_, shape, _ in rank] for rank in of_ranks]
    kinds = {kind for rank in of_ranks for *_, kind in rank}
    everyone = []
    for rank, counts, sums in zip(
        of_ranks, sizes, _gathered(own, max(map(sum, sizes)), kinds, member), strict=True
    ):
        for (number, first, count, shape, _), values in zip(
            rank, sums[: sum(counts)].split(counts), strict=True
        ):
            everyone.append(BlockSums(Whole(0, (), 0, number), first, count, values.view(shape)))
    before = sum(len(rank) for rank in of_ranks[: member.rank])
    return join_blocks(everyone)[before : before + len(own)]


def _gathered(own: list[BlockSums], size: int, kinds: set[str], member: Member) -> list[Tensor]:
    """Each rank's numbers, one after the other and filled up to ``size``, on the device where ranks have theirs."""
    device = own[0].values.device if own else torch.device("cpu")
    if not own and "cuda" in kinds:
        device = torch.device("cuda", torch.cuda.current_device())
    numbers = torch.zeros(size, dtype=torch.float64, device=device)
    if own:
        flat = torch.cat([block.values.reshape(-1) for block in own])
        numbers[: len(flat)] = flat
    everyone = [torch.empty_like(numbers) for _ in range(member.ranks)]
    if size:
        c10d.all_gather(everyone, numbers, group=member.group)
    return everyone
