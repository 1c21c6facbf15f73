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


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """bf16 x @ weight.T + bias for x (..., K), weight (M, K); or x @ weight for a weight (K, M), ``transposed``."""
    rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
    y: Tensor = _AutocastLinear.apply(rows, weight, bias, transposed)
    return y.view(*x.shape[:-1], y.shape[-1])


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, **transposed: bool) -> Tensor:
    """In bf16, by whoever is faster here; outside of autocast, which has done its part."""
    if amx():
        out = a.new_empty(a.shape[0], b.shape[0 if transposed.get("transpose_b") else 1])
        return ops.matmul(a, b, bias=bias, out=out, **transposed)
    b = b.t() if transposed.get("transpose_b") else b
    return a @ b if bias is None else torch.addmm(bias.to(a.dtype), a, b)


def activated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """bf16 gelu(x) @ weight + bias for x (..., K) bf16 and weight (K, M), whose backward computes the activation anew
    instead of keeping it."""
    y: Tensor = _ActivatedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, approximate)
    return y.view(*x.shape[:-1], y.shape[-1])


def _weight_gradient(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """left.T @ right in f32, from bf16 factors."""
    if amx():
        return ops.matmul(left, right, out=torch.empty_like(weight), transpose_a=True)
    return (left.t() @ right).float()


class _AutocastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        return _product(x, weight.to(torch.bfloat16), bias, transpose_b=not transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, weight.to(torch.bfloat16), transpose_b=ctx.transposed)
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(x, dy, weight) if ctx.transposed else _weight_gradient(dy, x, weight)
        if ctx.needs_input_grad[2]:
            dbias = column_sums(dy).float()
        return dx, dweight, dbias, None


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.approximate = approximate
        return _product(ops.gelu(x, approximate=approximate), weight.to(torch.bfloat16), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(ops.gelu(x, approximate=ctx.approximate), dy, weight)
        if ctx.needs_input_grad[2]:
            dbias = column_sums(dy).float()
        if ctx.needs_input_grad[0]:
            dactivated = _product(dy, weight.to(torch.bfloat16), transpose_b=True)
            dx, _ = ops.gelu_backward(dactivated, x, approximate=ctx.approximate)
        return dx, dweight, dbias, None
