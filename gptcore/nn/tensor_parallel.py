"""What layers split over a tensor group do at their ends: where rows come from, where sums over ranks are made.

A pair of products is split so that the first makes columns, some on each rank, of which the second makes a sum over
ranks (Shoeybi et al. 2019, "Megatron-LM", section 3). What lies between pairs is on every rank alike; with sequence
parallelism each rank has some rows of it (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models", section 4.2), so that a sum and its copies become a sum of rows and, later, their gathering.

All ranks have the same loss, so a gradient of what all compute alike is the same on all, and none is scaled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcore.dist import Member, Shard, gather_rows
from gptcore.dist.row_sums import gather_all, reduce_rows, sum_rows
from gptcore.nn.linear import Linear, column_sums, linear


class TensorPass(NamedTuple):
    """One forward pass over the ranks of ``member``.

    shape: of the whole batch without the width: (B, T), or (N,) of packed documents.
    rows: which rank has which of the N rows between split layers, with sequence parallelism; a stream is (n, C) then.
        None: every rank has all, as (*shape, C).
    """

    member: Member
    shape: tuple[int, ...]
    rows: Shard | None = None

    def enter(self, x: Tensor) -> Tensor:
        """(*shape, C) of the stream for a layer that makes columns: its gradient is summed over ranks."""
        return _Enter.apply(x, self)

    def leave(self, x: Tensor, layer: Linear) -> Tensor:
        """The stream of the whole ``layer(x)``, of which this rank has columns of x and of the weight, and all of the
        bias."""
        return self.sum(linear(x, layer.weight), layer.bias)

    def sum(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The stream of the sum over ranks of x (*shape, C), plus ``bias`` (C,)."""
        return _Sum.apply(x, bias, self)

    def gather(self, x: Tensor) -> Tensor:
        """(*shape, C) of the stream for what every rank computes alike."""
        return x if self.rows is None else _Gather.apply(x, self)

    def part(self, x: Tensor) -> Tensor:
        """The stream of what every rank computed alike, (*shape, C)."""
        return x if self.rows is None else _Part.apply(x, self)

    def own_rows(self, x: Tensor) -> Tensor:
        """This rank's of the rows of ``x`` (*shape, ...), without the other ranks' part in gradients."""
        flat = x.flatten(0, len(self.shape) - 1)
        return x if self.rows is None else flat[self.rows.start : self.rows.stop]

    def drop(self, x: Tensor, dropout: torch.nn.Module) -> Tensor:
        """``dropout(x)`` of the stream, with the bits it would have in one process."""
        if self.rows is None or not (isinstance(dropout, torch.nn.Dropout) and dropout.training):
            return dropout(x)
        factors = x.new_ones(self.rows.total, x.shape[-1])
        factors = torch.nn.functional.dropout(factors, dropout.p)
        return x * self.own_rows(factors.view(*self.shape, -1))


def gather_columns(x: Tensor, sizes: list[int], member: Member) -> Tensor:
    """(..., sum of sizes) of all ranks' x (..., sizes[rank]), for what every rank computes alike."""
    return _Columns.apply(x, tuple(sizes), member)


def _whole(x: Tensor, tensor: TensorPass) -> Tensor:
    """(*shape, C) of a stream x."""
    if tensor.rows is None:
        return x.view_as(x)
    return gather_rows(x, tensor.rows.sizes, tensor.member).view(*tensor.shape, x.shape[-1])


def _summed(x: Tensor, bias: Tensor | None, tensor: TensorPass) -> Tensor:
    """The stream of the sum of all ranks' x (*shape, C)."""
    flat = x.reshape(-1, x.shape[-1])
    if tensor.rows is not None:
        return reduce_rows(flat, tensor.rows, bias)
    return sum_rows(flat, tensor.member, bias).view(x.shape)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorPass) -> Tensor:
        ctx.tensor = tensor
        return _whole(x, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _summed(dy, None, ctx.tensor), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, tensor: TensorPass) -> Tensor:
        ctx.tensor = tensor
        return _summed(x, bias, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        dy = dy.contiguous()
        dx = _whole(dy, ctx.tensor) if ctx.needs_input_grad[0] else None
        dbias = column_sums(dy.view(-1, dy.shape[-1])) if ctx.needs_input_grad[1] else None
        return dx, dbias, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorPass) -> Tensor:
        ctx.tensor = tensor
        return _whole(x, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.tensor.own_rows(dy), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorPass) -> Tensor:
        ctx.tensor = tensor
        return tensor.own_rows(x).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _whole(dy.contiguous(), ctx.tensor), None


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], member: Member) -> Tensor:
        ctx.sizes, ctx.member = sizes, member
        # all-gather wants one shape from all
        padded = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[-1]))
        parts = gather_all(padded, member)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rank = ctx.member.rank
        return dy.narrow(-1, sum(ctx.sizes[:rank]), ctx.sizes[rank]), None, None
