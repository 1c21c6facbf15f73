"""Matrix products where libraries are weak: few rows in fixed order, and bf16 x bf16 accumulated into f32."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty, is_torch
from gptcore.ops.registration import TorchOp, refuse_out_with_grad


def matmul(
    a: Array,
    b: Array,
    *,
    bias: Array | None = None,
    out: Array | None = None,
    accumulate: bool = False,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> Array:
    """``out = a @ b``, ``a @ b + bias`` or ``out + a @ b``, summed in f32 in an order that only K fixes.

    Meant for few rows (decoding: M <= 64, weight stored (N, K) with ``transpose_b=True``, which reads the weight
    once at memory speed and gives a row the same bits in any batch) and for weight gradients
    (``matmul(dy, x, out=dw, accumulate=True, transpose_a=True)``). Any shape works; large plain products with a
    result of their own are torch's business. On CUDA all of them are: torch's products there, with f32 sums.

    Args:
        a: (M, K), or (K, M) with ``transpose_a``; f32 or bf16; one dimension contiguous.
        b: (K, N), or (N, K) with ``transpose_b``; a's dtype; one dimension contiguous.
        bias: (N,), f32 or a's dtype, contiguous: added to every row before the one rounding. Not with ``accumulate``.
        out: (M, N), rows contiguous; f32 or a's dtype; default a fresh array of a's dtype.
        accumulate: add to ``out``, which must be given and f32.

    Returns:
        ``out``, or the fresh array.

    Raises:
        ValueError, TypeError: shapes, dtypes, layouts or devices that do not fit; nothing is written then.
        RuntimeError: an argument requires grad; the product is not differentiable.
    """
    if is_torch(a):
        refuse_out_with_grad("matmul", a, b, bias, out)
        if out is None and not accumulate:
            return _matmul(a, b, bias, transpose_a, transpose_b)
    if out is None:
        if accumulate:
            raise ValueError("matmul: argument 'out': got None, expected an f32 array to accumulate into")
        out = _new_result(a, b, transpose_a, transpose_b)
    _run(a, b, bias, out, accumulate, transpose_a, transpose_b)
    return out


def matmul_reference(
    a: Any,
    b: Any,
    *,
    bias: Any = None,
    out: Any = None,
    accumulate: bool = False,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> Any:
    """The same in plain torch, any floating dtype; returns the new value of ``out`` and leaves it alone."""
    product = (a.mT if transpose_a else a) @ (b.mT if transpose_b else b)
    if bias is not None:
        product = product + bias.to(product.dtype)
    if out is None:
        return product
    return out + product.to(out.dtype) if accumulate else product.to(out.dtype)


def _new_result(a: Array, b: Array, transpose_a: bool, transpose_b: bool) -> Array:
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"matmul: got {a.ndim} and {b.ndim} dimensions, expected 2 and 2")
    return empty(a, (a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]))


def _fake(a: Any, b: Any, bias: Any, transpose_a: bool, transpose_b: bool) -> Any:
    return _new_result(a, b, transpose_a, transpose_b)


def _forward(a: Any, b: Any, bias: Any, transpose_a: bool, transpose_b: bool) -> Any:
    out = _new_result(a, b, transpose_a, transpose_b)
    _run(a, b, bias, out, False, transpose_a, transpose_b)
    return out


def _run(
    a: Array, b: Array, bias: Array | None, out: Array, accumulate: bool, transpose_a: bool, transpose_b: bool
) -> None:
    if is_torch(a) and a.device.type == "cuda":
        _by_torch(a.t() if transpose_a else a, b.t() if transpose_b else b, bias, out, accumulate)
    else:
        backend.extension().matmul(a, b, bias, out, accumulate, transpose_a, transpose_b)


def _by_torch(a: Any, b: Any, bias: Any, out: Any, accumulate: bool) -> None:
    """The product of torch tensors by torch, rounded once to ``out``'s dtype."""
    import torch

    if accumulate and bias is not None:
        raise ValueError("matmul: argument 'bias': got one with accumulate=True, expected None")
    if accumulate and out.dtype != torch.float32:
        raise TypeError(
            f"matmul: argument 'out': got {out.dtype} with accumulate=True, expected torch.float32"
        )
    added = out if accumulate else bias
    if a.dtype == out.dtype and (added is None or added.dtype == out.dtype):
        if added is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(added, a, b, out=out)
        return
    product = a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
    out.copy_(product if added is None else product.add_(added))


_matmul = TorchOp(
    "matmul",
    "(Tensor a, Tensor b, Tensor? bias, bool transpose_a, bool transpose_b) -> Tensor",
    forward=_forward,
    fake=_fake,
    lower_precision=True,
)
