"""Rotary position embedding: pairs of a head's elements turn by an angle that grows with the position."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty_like, is_torch, last_contiguous, namespace
from gptcore.ops.registration import TorchOp, refuse_out_with_grad


def rotary(
    x: Array,
    cos: Array,
    sin: Array,
    *,
    interleaved: bool = False,
    position: int | Array = 0,
    inverse: bool = False,
    out: Array | None = None,
) -> Array:
    """``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)`` for each pair of the first R of D elements.

    Its own backward: the gradient of ``x`` is this function of the result's gradient, with ``inverse`` turned over.

    Args:
        x: (B, T, H, D) or (T, H, D), f32 or bf16, any strides but the last; torch tensor (differentiable),
            NumPy or CuPy array.
        cos, sin: (L, R/2) f32, from :func:`rotary_tables`; not differentiated.
        interleaved: pairs are neighbours, (x[2i], x[2i+1]), as in GPT-J; else halves, (x[i], x[i+R/2]), as in
            GPT-NeoX and LLaMA.
        position: of the first token, the others follow; or int32 positions (T,) or (B, T).
        inverse: turn back, by the negative angles.
        out: where to write the result, ``x`` itself for in place; like ``x``. Not differentiable.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a position beyond the table; nothing
            is written then.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    positions, offset = (None, position) if isinstance(position, int) else (position, 0)
    if is_torch(x):
        if out is None:
            return _rotary(x, cos, sin, positions, offset, interleaved, inverse)
        refuse_out_with_grad("rotary", x)
    return _run(x, cos, sin, positions, offset, interleaved, inverse, out)


def rotary_tables(
    length: int, dim: int, base: float = 10000.0, *, like: Array | None = None
) -> tuple[Array, Array]:
    """``cos`` and ``sin`` of ``p * base^(-2i / dim)``: (length, dim / 2) f32, computed in f64.

    Args:
        length: positions, 0 to length - 1.
        dim: R, the rotated part of a head, even.
        like: an array whose framework and device the tables shall have; default torch on the CPU.

    Raises:
        ValueError: ``dim`` is odd or below 2, ``length`` negative.
        ImportError: no ``like``, and torch cannot be imported.
    """
    import numpy

    if dim < 2 or dim % 2:
        raise ValueError(f"rotary_tables: argument 'dim': got {dim}, expected an even number from 2")
    if length < 0:
        raise ValueError(f"rotary_tables: argument 'length': got {length}, expected 0 or more")
    frequencies = float(base) ** (-numpy.arange(0, dim, 2, dtype=numpy.float64) / dim)
    angles = numpy.outer(numpy.arange(length, dtype=numpy.float64), frequencies)
    tables = tuple(f(angles).astype(numpy.float32) for f in (numpy.cos, numpy.sin))
    if like is None or is_torch(like):
        from gptcore.torch_required import torch

        cos, sin = (torch.from_numpy(t) for t in tables)
        return (cos, sin) if like is None else (cos.to(like.device), sin.to(like.device))
    module = namespace(like)
    return module.asarray(tables[0]), module.asarray(tables[1])


def rotary_reference(
    x: Any,
    cos: Any,
    sin: Any,
    *,
    interleaved: bool = False,
    position: Any = 0,
    inverse: bool = False,
) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times."""
    import torch

    length = x.shape[-3]
    index = torch.arange(length) + position if isinstance(position, int) else position.long()
    c, s = (table[index].to(x.dtype).unsqueeze(-2) for table in (cos, -sin if inverse else sin))
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((a * c - b * s, b * c + a * s), -1)
        return torch.cat((pairs.flatten(-2), rest), -1)
    a, b = turned[..., :half], turned[..., half:]
    return torch.cat((a * c - b * s, b * c + a * s, rest), -1)


def _run(
    x: Array,
    cos: Array,
    sin: Array,
    positions: Any,
    offset: int,
    interleaved: bool,
    inverse: bool,
    out: Array | None = None,
) -> Array:
    if out is None:
        out = empty_like(x)
    backend.extension().rotary(last_contiguous(x), cos, sin, positions, offset, interleaved, inverse, out)
    return out


# --- torch -------------------------------------------------------------------------------------------------


def _fake(x: Any, cos: Any, sin: Any, positions: Any, offset: int, interleaved: bool, inverse: bool) -> Any:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cos, sin, positions, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
    offset, interleaved, inverse = ctx.options
    dx = _rotary(grad, *ctx.saved_tensors, offset, interleaved, not inverse)
    return dx, None, None, None, None, None, None


def _eager_backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
    offset, interleaved, inverse = ctx.options
    cos, sin, positions = ctx.saved_tensors
    dx = _run(grad, cos, sin, positions, offset, interleaved, not inverse)
    return dx, None, None, None, None, None, None


_rotary = TorchOp(
    "rotary",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, bool interleaved, bool inverse)"
    " -> Tensor",
    forward=_run,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    eager_backward=_eager_backward,
)
