"""Tokens to their experts and back: the permutations between :func:`moe_router` and the experts' products."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, contiguous, empty, empty_like, last_contiguous
from gptcore.ops.registration import TorchOp


def moe_dispatch(x: Array, rows: Array, offsets: Array) -> Array:
    """Each token's row at the places of its choices, tokens of one expert side by side.

    Args:
        x: (N, C), f32 or bf16; torch tensor (differentiable), NumPy array.
        rows, offsets: (N, K) and (E + 1,) int32, as :func:`moe_router` gives them.

    Returns:
        (N K, C), x's dtype: expert e's tokens in rows offsets[e] to offsets[e + 1] - 1, zeros after the last.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or rows that do not fit; nothing is written then.
    """
    return _dispatch(x, rows, offsets)


def moe_dispatch_backward(dout: Array, rows: Array) -> Array:
    """Gradient of :func:`moe_dispatch` by ``x``, (N, C): the sum over a token's places. dout: (N K, C)."""
    return _run_combine(dout, rows, None, None)


def moe_combine(y: Array, rows: Array, offsets: Array, gates: Array | None = None) -> Array:
    """The experts' results back at their tokens: ``out[n] = sum_k gates[n, k] y[rows[n, k]]``.

    Args:
        y: (N K, C), f32 or bf16, as :func:`moe_dispatch` lays rows out; torch tensor (differentiable), NumPy array.
        rows, offsets: as for :func:`moe_dispatch`.
        gates: (N, K) f32 (differentiable); None is all 1.

    Returns:
        (N, C), y's dtype, summed in f32 in the order of the choices and rounded once; 0 for a token all of whose
        choices were dropped.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or rows that do not fit; nothing is written then.
    """
    return _combine(y, rows, offsets, gates)


def moe_combine_backward(
    dout: Array, y: Array, rows: Array, offsets: Array, gates: Array
) -> tuple[Array, Array]:
    """Gradients of :func:`moe_combine` by ``y``, (N K, C), and by ``gates``, (N, K) f32, 0 where dropped.

    Args:
        dout: (N, C), y's dtype.
    """
    dy, dgates = empty_like(y), empty_like(gates)
    backend.extension().moe_combine_backward(
        last_contiguous(dout), last_contiguous(y), rows, contiguous(gates), offsets, dy, dgates
    )
    return dy, dgates


def moe_dispatch_reference(x: Any, rows: Any, offsets: Any) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times."""
    kept = rows.flatten() >= 0
    token = _token_of_choice(rows)[kept]
    out = x.new_zeros(rows.numel(), x.shape[1])
    return out.index_put((rows.flatten()[kept].long(),), x[token])


def moe_combine_reference(y: Any, rows: Any, offsets: Any, gates: Any = None) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times."""
    taken = y[rows.flatten().clamp(min=0).long()].view(*rows.shape, y.shape[1])
    weights = (rows >= 0).to(y.dtype)
    return (taken * (weights if gates is None else weights * gates)[..., None]).sum(1).to(y.dtype)


def _token_of_choice(rows: Any) -> Any:
    import torch

    return torch.arange(rows.shape[0]).repeat_interleave(rows.shape[1])


def _sorted_rows(x: Array, rows: Array) -> Array:
    if x.ndim != 2 or rows.ndim != 2:
        raise ValueError(
            f"moe_dispatch: got 'x' of {x.ndim} and 'rows' of {rows.ndim} dimensions, expected 2 and 2"
        )
    return empty(x, (rows.shape[0] * rows.shape[1], x.shape[1]))


def _run_dispatch(x: Array, rows: Array, offsets: Array) -> Array:
    out = _sorted_rows(x, rows)
    backend.extension().moe_dispatch_forward(last_contiguous(x), rows, offsets, out)
    return out


def _run_combine(y: Array, rows: Array, offsets: Any, gates: Any) -> Array:
    out = empty(y, (rows.shape[0], y.shape[-1]))
    backend.extension().moe_combine_forward(last_contiguous(y), rows, contiguous(gates), offsets, out)
    return out


# --- torch ------------------------------------------------------------------------------------------------------


def _dispatch_fake(x: Any, rows: Any, offsets: Any) -> Any:
    return _sorted_rows(x, rows)


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _dispatch_backward(ctx: Any, dout: Any) -> tuple[Any, ...]:
    return _combine(dout, *ctx.saved_tensors, None), None, None


def _combine_fake(y: Any, rows: Any, offsets: Any, gates: Any) -> Any:
    return empty(y, (rows.shape[0], y.shape[-1]))


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    y, rows, offsets, gates = inputs
    ctx.save_for_backward(rows, offsets, *(() if gates is None else (gates, y)))


def _combine_backward(ctx: Any, dout: Any) -> tuple[Any, ...]:
    rows, offsets, *weighted = ctx.saved_tensors
    if not weighted:
        return _dispatch(dout, rows, offsets), None, None, None
    gates, y = weighted
    dy, dgates = _combine_backward_op(dout, y, rows, offsets, gates)
    return dy, None, None, dgates


def _combine_backward_fake(dout: Any, y: Any, rows: Any, offsets: Any, gates: Any) -> tuple[Any, Any]:
    return empty_like(y), empty_like(gates)


_dispatch = TorchOp(
    "moe_dispatch",
    "(Tensor x, Tensor rows, Tensor offsets) -> Tensor",
    forward=_run_dispatch,
    fake=_dispatch_fake,
    setup_context=_dispatch_setup,
    backward=_dispatch_backward,
)
_combine_backward_op = TorchOp(
    "moe_combine_backward",
    "(Tensor dout, Tensor y, Tensor rows, Tensor offsets, Tensor gates) -> (Tensor, Tensor)",
    forward=moe_combine_backward,
    fake=_combine_backward_fake,
)
_combine = TorchOp(
    "moe_combine",
    "(Tensor y, Tensor rows, Tensor offsets, Tensor? gates) -> Tensor",
    forward=_run_combine,
    fake=_combine_fake,
    setup_context=_combine_setup,
    backward=_combine_backward,
)
