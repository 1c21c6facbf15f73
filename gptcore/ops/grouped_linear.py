"""The linear layers of all experts of a mixture-of-experts layer, in one call over rows sorted by expert."""

from __future__ import annotations

import itertools
from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty, empty_like, rows
from gptcore.ops.grouped_library import ALL_OURS, differentiate_large, largest_of_ours, multiply_large
from gptcore.ops.registration import TorchOp, refuse_out_with_grad


def grouped_linear(
    x: Array,
    weight: Array,
    offsets: Array,
    *,
    bias: Array | None = None,
    out: Array | None = None,
    batch_invariant: bool = False,
) -> Array:
    """``y[r] = x[r] @ weight[e].T + bias[e]`` for ``offsets[e] <= r < offsets[e + 1]``; rows from the last on are 0.

    An expert's rows have the same bits whatever the other experts' are and on any number of threads, so experts spread
    over processes give one process's bits. In bf16 a row has the same bits whatever other rows its own expert has. In
    f32 it may have one of two: torch multiplies an expert's rows from 512 on (for the gradient of ``x`` from 64 on),
    where tensors are torch's, no width is under 64 and gptcore was imported before torch, which is how MKL is told to
    keep to a fixed order; on either side of that limit a row's bits are its own again. Sums are f32, rounded once.

    Args:
        x: (M, Cin), f32 or bf16, rows sorted by expert.
        weight: (E, Cout, Cin), x's dtype, contiguous.
        offsets: (E + 1,) int32, ``offsets[0] == 0``, not falling, at most M.
        bias: (E, Cout), f32 or x's dtype, contiguous, or None.
        out: where to write ``y``; (M, Cout) of x's dtype. Not differentiable.
        batch_invariant: a row of ``y``, and of the gradient of ``x``, has one set of bits in f32 too, whatever rows its
            expert has.

    Returns:
        (M, Cout) of x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes, layouts, devices or offsets that do not fit; nothing is written then.
    """
    if out is None:
        return _grouped_linear(x, weight, offsets, bias, batch_invariant)
    refuse_out_with_grad("grouped_linear", x, weight, bias, out)
    _write(x, weight, offsets, bias, out, batch_invariant)
    return out


def grouped_linear_backward(
    dy: Array,
    x: Array,
    weight: Array,
    offsets: Array,
    *,
    bias: Array | None = None,
    out: Array | None = None,
    accumulate: bool = False,
    need_dx: bool = True,
    need_dweight: bool = True,
    batch_invariant: bool = False,
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients ``(dx, dweight, dbias)`` of :func:`grouped_linear`, None for what is not wanted.

    Args:
        dy: (M, Cout), gradient of ``y``.
        bias: forward's, which dbias is like; None where there was none.
        out: where dweight goes: (E, Cout, Cin), f32 or x's dtype, contiguous; default a fresh array like ``weight``.
        accumulate: add dweight to ``out``, in f32, rounded once to its dtype.
        need_dx, need_dweight: what is wanted.
        batch_invariant: as for :func:`grouped_linear`.
    """
    if out is None and accumulate:
        raise ValueError(
            "grouped_linear_backward: argument 'out': got None, expected an array to accumulate into"
        )
    dx = empty_like(x) if need_dx else None
    dweight = (empty_like(weight) if out is None else out) if need_dweight else None
    dbias = None if bias is None else empty_like(bias)
    dy, x = rows(dy), rows(x)
    largest = ALL_OURS if batch_invariant else largest_of_ours(dy, weight, offsets, x, dweight)
    backend.extension().grouped_linear_backward(
        dy, x, weight, offsets, dx, dweight, dbias, accumulate, largest.dx, largest.dweight
    )
    if min(largest) < dy.shape[0]:
        differentiate_large(dy, x, weight, offsets, dx, dweight, accumulate, largest)
    return dx, dweight, dbias


def grouped_linear_reference(x: Any, weight: Any, offsets: Any, *, bias: Any = None) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times."""
    ends = offsets.tolist()
    # unbound once: a gradient through weight[e] would be as large as weight for every expert
    parts = [x[a:b] @ w.mT for w, (a, b) in zip(weight.unbind(), itertools.pairwise(ends), strict=True)]
    if bias is not None:
        parts = [part + b.to(part.dtype) for part, b in zip(parts, bias.unbind(), strict=True)]
    import torch

    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], weight.shape[1])])


# --- torch -------------------------------------------------------------------------------------------------


def _forward(x: Any, weight: Any, offsets: Any, bias: Any, batch_invariant: bool) -> Any:
    out = _fake(x, weight, offsets, bias, batch_invariant)
    _write(x, weight, offsets, bias, out, batch_invariant)
    return out


def _write(x: Any, weight: Any, offsets: Any, bias: Any, out: Any, batch_invariant: bool) -> None:
    x = rows(x)
    largest = (ALL_OURS if batch_invariant else largest_of_ours(x, weight, offsets, bias, out)).y
    backend.extension().grouped_linear(x, weight, offsets, bias, out, largest)
    if largest < x.shape[0]:
        multiply_large(x, weight, offsets, bias, out, largest)


def _fake(x: Any, weight: Any, offsets: Any, bias: Any, batch_invariant: bool) -> Any:
    if x.ndim != 2 or weight.ndim != 3:
        raise ValueError(
            f"grouped_linear: got 'x' of {x.ndim} and 'weight' of {weight.ndim} dimensions, expected 2 and 3"
        )
    return empty(x, (x.shape[0], weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.batch_invariant = inputs[4]


def _backward(ctx: Any, grad_y: Any) -> tuple[Any, ...]:
    x, weight, offsets, bias = ctx.saved_tensors
    need_dx, need_dweight, _, need_dbias, _ = ctx.needs_input_grad
    dx, dweight, dbias = _gradient(
        grad_y, x, weight, offsets, bias if need_dbias else None, need_dx, need_dweight, ctx.batch_invariant
    )
    given = (dx if need_dx else None, dweight if need_dweight else None, None, dbias if need_dbias else None)
    return *given, None


def _backward_inference(
    dy: Any,
    x: Any,
    weight: Any,
    offsets: Any,
    bias: Any,
    need_dx: bool,
    need_dweight: bool,
    batch_invariant: bool,
) -> tuple[Any, ...]:
    return grouped_linear_backward(
        dy,
        x,
        weight,
        offsets,
        bias=bias,
        need_dx=need_dx,
        need_dweight=need_dweight,
        batch_invariant=batch_invariant,
    )


def _backward_forward(*inputs: Any) -> tuple[Any, ...]:
    x = inputs[1]
    return tuple(x.new_empty((0,)) if g is None else g for g in _backward_inference(*inputs))


def _backward_fake(
    dy: Any,
    x: Any,
    weight: Any,
    offsets: Any,
    bias: Any,
    need_dx: bool,
    need_dweight: bool,
    batch_invariant: bool,
) -> tuple[Any, ...]:
    wanted = (x if need_dx else None, weight if need_dweight else None, bias)
    return tuple(x.new_empty((0,)) if like is None else like.new_empty(like.shape) for like in wanted)


_gradient = TorchOp(
    "grouped_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor offsets, Tensor? bias, bool need_dx, bool need_dweight,"
    " bool batch_invariant)"
    " -> (Tensor, Tensor, Tensor)",
    forward=_backward_forward,
    fake=_backward_fake,
    inference=_backward_inference,
)
_grouped_linear = TorchOp(
    "grouped_linear",
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, bool batch_invariant) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    lower_precision=True,
)
