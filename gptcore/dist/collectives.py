"""Rows of matrices between the ranks of a group, differentiable once.

Everything goes by all-to-all and all-gather; sums over ranks are made here, in rank order, so that their bits depend on
neither the backend's algorithm nor time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcore.dist.group import Member


def exchange_rows(
    x: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    member: Member,
    *,
    rows: int | None = None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """The first ``send[0]`` rows of ``x`` to rank 0, the next ``send[1]`` to rank 1 and so on.

    Args:
        x: (M, C), M at least the sum of ``send``; what follows stays here.
        send, receive: rows to and from each rank.
        rows: of the result; None: the sum of ``receive``.
        gradient_scale: by which the gradient is multiplied on its way back.

    Returns:
        (rows, C): rank 0's rows, then rank 1's and so on, then zeros.
    """
    rows = sum(receive) if rows is None else rows
    return _Exchange.apply(x, tuple(send), tuple(receive), member.group, rows, gradient_scale)


def gather_rows(x: Tensor, rows: Sequence[int], member: Member) -> Tensor:
    """All ranks' ``x`` one after the other; rank r has ``rows[r]`` rows. The gradient is the sum over ranks."""
    return _Gather.apply(x, tuple(rows), member)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send: tuple[int, ...],
        receive: tuple[int, ...],
        group: Any,
        rows: int,
        scale: float,
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.rows, ctx.scale = send, receive, group, x.shape[0], scale
        return _exchange(x, send, receive, group, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = _exchange(dy, ctx.receive, ctx.send, ctx.group, ctx.rows)
        return dx.mul_(ctx.scale) if ctx.scale != 1.0 else dx, None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], member: Member) -> Tensor:
        ctx.rows, ctx.member = rows, member
        longest = max(rows)  # all-gather wants one shape from all
        padded = x.contiguous()
        if x.shape[0] < longest:
            padded = torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])])
        out = x.new_empty(member.ranks, longest, *x.shape[1:])
        if out.numel():
            c10d.all_gather(list(out.unbind()), padded, group=member.group)
        if min(rows) == longest:
            return out.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(out, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        _, rank, ranks = ctx.member
        own = ctx.rows[rank]
        parts = _exchange(dy, ctx.rows, (own,) * ranks, ctx.member.group, own * ranks)
        first, *others = parts.view(ranks, own, *dy.shape[1:]).unbind()
        for part in others:
            first += part
        return first, None, None


def _exchange(x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Any, rows: int) -> Tensor:
    out = x.new_empty(rows, *x.shape[1:])
    sent, received = sum(send), sum(receive)
    out[received:].zero_()
    c10d.all_to_all_single(out[:received], x[:sent].contiguous(), list(receive), list(send), group=group)
    return out
