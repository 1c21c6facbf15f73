"""Sums over the slices of all ranks, with the same bits however many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.dist.flat_unit import BLOCK
from gptcore.dist.group import Member


def norm_of_all(gradients: Sequence[Tensor], scale: float, member: Member) -> tuple[float, bool]:
    """The norm over ``scale`` of all ranks' gradients, and whether one of them is not finite; slices of ``BLOCK``s."""
    from gptcore.ops.grad_norm import square_sums

    sums, found_inf = square_sums(gradients, BLOCK)
    terms: list[float] = [*_exact_terms(sums.tolist())]
    if member.ranks > 1:
        own = torch.tensor([*terms, float(found_inf)], dtype=torch.float64)
        all_ranks = own.new_empty(member.ranks, len(own))
        c10d.all_gather(list(all_ranks.unbind()), own, group=member.group)
        terms = all_ranks[:, :-1].reshape(-1).tolist()
        found_inf = bool(all_ranks[:, -1].any())
    return math.nan if found_inf else math.sqrt(math.fsum(terms)) / scale, found_inf


def _exact_terms(values: Sequence[float]) -> tuple[float, float, float]:
    """Three numbers whose sum is that of ``values`` to more than 150 bits: what is added to it can be in any order."""
    terms: list[float] = []
    for _ in range(3):
        rest = math.fsum((*values, *(-term for term in terms)))
        terms.append(rest if math.isfinite(rest) else 0.0)
    return terms[0], terms[1], terms[2]
