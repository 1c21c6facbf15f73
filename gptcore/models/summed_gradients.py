"""Gradients of parameters that several ranks have and each of which sees a part of what they do, summed in backward.

All are summed in one message, when the last part is there. The forward pass sees copies of the parameters whose
gradients go that way, so neither the layers nor the loop around them need to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptcore.dist import Member
from gptcore.dist.row_sums import gather_all


class SharedGradient(NamedTuple):
    """Rows ``start`` to ``stop`` - 1 of the gradient of ``module``'s parameter ``name`` are the sum over ``ranks``."""

    module: nn.Module
    name: str
    start: int
    stop: int
    ranks: range


@contextmanager
def summed_gradients(shared: Sequence[SharedGradient], member: Member) -> Iterator[None]:
    """Within it a forward pass uses parameters whose gradients are summed over ranks."""
    wanted = [one for one in shared if getattr(one.module, one.name).requires_grad]
    if not (wanted and torch.is_grad_enabled()):
        yield
        return
    parameters = [getattr(one.module, one.name) for one in wanted]
    seen = _Summed.apply(wanted, member, *parameters)
    try:
        for one, tensor in zip(wanted, seen, strict=True):
            one.module._parameters[one.name] = tensor
        yield
    finally:
        for one, parameter in zip(wanted, parameters, strict=True):
            one.module._parameters[one.name] = parameter


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shared: Sequence[SharedGradient], member: Member, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shared, ctx.member = shared, member
        ctx.set_materialize_grads(False)
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # contiguous and ours: an expanded gradient, or one that autograd uses elsewhere, must not be written to
        own = [None if g is None else g.clone(memory_format=torch.contiguous_format) for g in gradients]
        parts = [
            (g[one.start : one.stop], one.ranks)
            for g, one in zip(own, ctx.shared, strict=True)
            if g is not None
        ]
        if parts:
            _sum(parts, ctx.member)
        return None, None, *own


def _sum(parts: Sequence[tuple[Tensor, range]], member: Member) -> None:
    """Replace each of ``parts`` by its sum over its ranks, made in f32 in rank order."""
    flat = torch.cat([part.reshape(-1).float() for part, _ in parts])
    lengths = [part.numel() for part, _ in parts]
    columns = gather_all(flat, member).split(lengths, 1)
    for (part, ranks), column in zip(parts, columns, strict=True):
        total = column[ranks[0]].clone()
        for rank in ranks[1:]:
            total += column[rank]
        part.copy_(total.view(part.shape))
