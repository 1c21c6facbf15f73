"""Sums over ranks of matrices, in f32 and in rank order, so that their bits depend on neither backend nor time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.dist.collectives import exchange_rows, gather_rows
from gptcore.dist.group import Member
from gptcore.dist.shard import Shard


def sum_rows(x: Tensor, member: Member, bias: Tensor | None = None) -> Tensor:
    """On every rank the sum of all ranks' ``x`` (N, C), plus ``bias`` (C,), rounded once to x's dtype."""
    shard = Shard.of(x.shape[0], member)
    if member.ranks == 2 or x.shape[0] < member.ranks:
        # of two ranks' matrices whole ones are no more traffic than halves twice, and one message
        return _summed(list(gather_all(x, member)), bias)
    return gather_rows(reduce_rows(x, shard, bias), shard.sizes, member)


def reduce_rows(x: Tensor, shard: Shard, bias: Tensor | None = None) -> Tensor:
    """This rank's rows of the sum that :func:`sum_rows` gives, with its bits."""
    own = shard.stop - shard.start
    parts = exchange_rows(x, shard.sizes, [own] * shard.member.ranks, shard.member)
    return _summed(list(parts.view(shard.member.ranks, own, x.shape[1])), bias)


def gather_all(x: Tensor, member: Member) -> Tensor:
    """(P, *x.shape): ``x``, of one shape everywhere, of all ranks."""
    out = x.new_empty(member.ranks, *x.shape)
    if out.numel():
        c10d.all_gather(list(out.unbind()), x.contiguous(), group=member.group)
    return out


def _summed(parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    dtype = parts[0].dtype
    total = parts[0].to(torch.promote_types(dtype, torch.float32))
    for part in [*parts[1:], *([] if bias is None else [bias])]:
        total = total + part
    return total.to(dtype)
