"""The linear map, with the same bits on every thread count and, where no gradient is wanted, for every batch.

Plain large products go to torch. Three things don't:

* f32 products with a dimension below 64, whose bits depend on the thread count in the library: they go to
  ``ops.matmul``, whose order of summation is fixed by the shape;
* the bias gradient, a sum over rows, for the same reason: it is the product of a row of ones with the
  output's gradient;
* up to 64 rows without gradients (decoding): ``ops.matmul`` gives a row the same bits in every batch.

Rows N, input width K, output width M. Under torch.compile, autocast and on other devices or dtypes it is
``torch.nn.functional.linear``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcore import ops

# Rows up to which decoding takes the fixed-order kernel, and the size of a product's smallest dimension below
# which the library's f32 bits move with the thread count.
SMALL = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x (..., K), weight (M, K), bias (M,)."""
    if not _ours(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if wanted and (bias is not None or _unstable(x, weight)):
        return _Linear.apply(x, weight, bias)
    if wanted:
        return torch.nn.functional.linear(x, weight)
    return _forward(x, weight, bias, decoding=True)


def product(a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """op(a) @ op(b) for matrices of one dtype; f32 with a small dimension in a fixed order of summation."""
    if a.dtype == torch.float32 and min(*a.shape, *b.shape) < SMALL:
        return ops.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b)
    return (a.t() if transpose_a else a) @ (b.t() if transpose_b else b)


def column_sums(x: Tensor) -> Tensor:
    """Sum over the rows of x (N, M) in a fixed order.

    torch's own f32 sum changed its bits with the thread count in 2 of 500 random shapes; its bf16 products never
    did, and are three times as fast as ours at this shape.
    """
    ones = torch.ones(1, x.shape[0], dtype=x.dtype, device=x.device)
    if x.dtype == torch.bfloat16:
        return (ones @ x)[0]
    return ops.matmul(x, ones, transpose_a=True, transpose_b=True)[:, 0]


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the products may be ours; mistakes go to torch as well, whose errors a user knows."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dtype == weight.dtype
        and (bias is None or bias.dtype == x.dtype)
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _unstable(x: Tensor, weight: Tensor) -> bool:
    """Whether one of the three products, forward or backward, has a dimension too small for the library."""
    return x.dtype == torch.float32 and min(x.numel() // x.shape[-1], *weight.shape) < SMALL


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, decoding: bool) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if not _unstable(x, weight) and not (decoding and rows <= SMALL):
        return torch.nn.functional.linear(x, weight, bias)
    y = ops.matmul(x.reshape(rows, x.shape[-1]), weight, transpose_b=True)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias, decoding=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        # an expanded gradient (of a sum) has no contiguous dimension, which every product wants
        flat_dy, flat_x = dy.contiguous().view(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = product(flat_dy, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = product(flat_dy, flat_x, transpose_a=True)
        if ctx.needs_input_grad[2]:
            dbias = column_sums(flat_dy)
        return dx, dweight, dbias


class Linear(torch.nn.Linear):
    """``torch.nn.Linear``, its arguments and state dict, over ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
