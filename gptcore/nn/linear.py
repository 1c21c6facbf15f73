"""The linear map, with the same bits on every thread count and, where no gradient is wanted, for every batch.

Plain large products go to torch. These don't:

* products whose bits depend on the thread count in the library: in f32 those with a dimension below 64, in bf16
  all of them where the library uses AMX (of 400 random shapes each, a third changed between 1, 2 and 4 threads;
  without AMX none did). They go to ``ops.matmul``, whose order of summation is fixed by the shape;
* the bias gradient, a sum over rows, for the same reason: it is the product of a row of ones with the
  output's gradient;
* up to 64 rows without gradients (decoding): ``ops.matmul`` gives a row the same bits in every batch.

``GPTCORE_FIXED_ORDER=0`` in the environment leaves training's products to the library, whatever its bits.
Under torch.compile, torch.func's transforms, autocast and on other devices or dtypes it is
``torch.nn.functional.linear``.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcore import backend, ops
from gptcore.nn.half_precision import in_f32, is_half

# Rows up to which decoding takes the fixed-order kernel, and the size of a product's smallest dimension below
# which the library's f32 bits move with the thread count.
SMALL = 64

_fixed_order = os.environ.get("GPTCORE_FIXED_ORDER", "1") != "0"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x (..., K), weight (M, K), bias (M,); see the top of the file for who computes it."""
    if x.device.type == "cpu" and is_half(x) and is_half(weight):
        return in_f32(linear)(x, weight, bias)
    if not _ours(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if wanted and (bias is not None or moves(x, weight)):
        return _Linear.apply(x, weight, bias)
    if wanted:
        return torch.nn.functional.linear(x, weight)
    return _forward(x, weight, bias, decoding=True)


def product(a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """op(a) @ op(b) for matrices of one dtype, in a fixed order of summation."""
    if moves(a, b):
        return ops.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b)
    return (a.t() if transpose_a else a) @ (b.t() if transpose_b else b)


def column_sums(x: Tensor) -> Tensor:
    """Sum over the rows of x (N, M) in a fixed order; torch's own f32 sum changed its bits with the thread count in
    2 of 500 random shapes."""
    return ops.matmul(torch.ones(1, x.shape[0], dtype=x.dtype, device=x.device), x)[0]


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the products may be ours; mistakes go to torch as well, whose errors a user knows."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dtype == weight.dtype
        and (
            bias is None
            or (bias.dtype == x.dtype and bias.shape == weight.shape[:1] and bias.is_contiguous())
        )
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None  # torch.func
    )


def moves(a: Tensor, b: Tensor) -> bool:
    """Whether the library's bits for a product of these matrices (a of any number of dimensions) may move, so that it
    is ours: on the CPU only."""
    if not _fixed_order or a.device.type != "cpu":
        return False
    if a.dtype == torch.bfloat16:
        return amx()
    return min(a.numel() // a.shape[-1], a.shape[-1], *b.shape) < SMALL


@functools.cache
def amx() -> bool:
    """Whether the library multiplies bf16 by AMX tiles and so splits sums over threads."""
    return "amx" in backend.available_isas()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, decoding: bool) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if not moves(x, weight) and not (decoding and rows <= SMALL):
        return torch.nn.functional.linear(x, weight, bias)
    y = ops.matmul(x.reshape(rows, x.shape[-1]), weight, bias=bias, transpose_b=True)
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

    def product(self, input: Tensor) -> Tensor:
        """(..., M): ``forward`` without the bias, for who adds it in a kernel of its own."""
        return linear(input, self.weight)
