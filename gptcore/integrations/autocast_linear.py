"""A linear layer in training under bf16 autocast, without the copy of its weight that autocast keeps until backward.

The weight is cast for each product and forgotten, and its gradient comes from bf16 factors straight in f32, where
autocast rounds it to bf16 and casts that. On machines with AMX the products are ours, which are faster than the
library's there; on others they are the library's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcore import ops
from gptcore.nn.linear import SMALL, amx, column_sums


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`autocast_linear` may stand in for the layer in this call."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and (bias is None or bias.dtype == torch.float32)
        and x.numel() > SMALL * x.shape[-1]
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def autocast_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool, gelu: str | None = None
) -> Tensor:
    """bf16 x @ weight.T + bias for x (..., K), weight (M, K); or x @ weight for a weight (K, M), ``transposed``.

    With ``gelu``, torch's name of its form, gelu(x) takes the place of x, and backward computes it anew instead of
    keeping it.
    """
    rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
    y: Tensor = _AutocastLinear.apply(rows, weight, bias, transposed, gelu)
    return y.view(*x.shape[:-1], y.shape[-1])


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, **transposed: bool) -> Tensor:
    """In bf16, by whoever is faster here; outside of autocast, which has done its part."""
    if amx():
        out = a.new_empty(a.shape[0], b.shape[0 if transposed.get("transpose_b") else 1])
        return ops.matmul(a, b, bias=bias, out=out, **transposed)
    b = b.t() if transposed.get("transpose_b") else b
    return a @ b if bias is None else torch.addmm(bias.to(a.dtype), a, b)


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
    """x.T @ dy in f32 for a weight (K, M), else dy.T @ x, from bf16 factors."""
    left, right = (x, dy) if transposed else (dy, x)
    if amx():
        return ops.matmul(left, right, out=torch.empty_like(weight), transpose_a=True)
    return (left.t() @ right).float()


def _activated(x: Tensor, gelu: str | None) -> Tensor:
    return x if gelu is None else ops.gelu(x, approximate=gelu)


class _AutocastLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, gelu: str | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.gelu = transposed, gelu
        return _product(_activated(x, gelu), weight.to(torch.bfloat16), bias, transpose_b=not transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(_activated(x, ctx.gelu), dy, weight, transposed=ctx.transposed)
        if ctx.needs_input_grad[2]:
            dbias = column_sums(dy).float()
        if ctx.needs_input_grad[0]:
            dx = _product(dy, weight.to(torch.bfloat16), transpose_b=ctx.transposed)
            if ctx.gelu is not None:
                dx, _ = ops.gelu_backward(dx, x, approximate=ctx.gelu)
        return dx, dweight, dbias, None, None
