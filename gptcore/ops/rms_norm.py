"""Root mean square normalisation over the last dimension, with an optional residual add in front."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty, empty_like, is_torch, rows
from gptcore.ops.registration import TorchOp, refuse_out_with_grad


def rms_norm(
    x: Array,
    weight: Array | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    residual: Array | None = None,
    out: Array | None = None,
) -> Any:
    """``y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset)`` with ``h = x + residual``.

    Args:
        x: (..., C), f32 or bf16; torch tensor (differentiable), NumPy or CuPy array.
        weight: (C,), f32 or bf16, or None.
        eps: added to the mean square.
        weight_offset: added to ``weight``, in f32: 1 for a zero-centred weight, whose zero is the identity
            (Gemma). Needs a weight.
        residual: like ``x``; added first, and the sum is returned too (a pre-norm block needs both).
        out: where to write ``y``; shape and dtype of ``x``. Not differentiable.

    Returns:
        ``y``, shape and dtype of ``x``; with ``residual``, the pair ``(y, h)``, h rounded to x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; nothing is written then.

    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization". Sums are f32 whatever the dtype.
    """
    if out is None:
        if residual is None:
            y = _rms_norm(x, weight, eps, weight_offset)
            return y[0] if type(y) is tuple else y
        return _add_rms_norm(x, residual, weight, eps, weight_offset)[:2]
    refuse_out_with_grad("rms_norm", x, residual, weight)
    y, h, _ = _run(x, residual, weight, eps, weight_offset, None, out)
    return y if residual is None else (y, h)


def rms_norm_stats(x: Array, eps: float = 1e-6) -> Array:
    """``1 / sqrt(mean(x^2) + eps)`` of each row of ``x`` (..., C): (N,) f32, as backward wants it."""
    return _run(x, None, None, eps, 0.0, _new_stats(x))[2]


def rms_norm_backward(
    grad_y: Array,
    h: Array,
    weight: Array | None,
    rstd: Array,
    *,
    weight_offset: float = 0.0,
    grad_h: Array | None = None,
) -> tuple[Array, Array | None]:
    """Gradients of :func:`rms_norm`: ``(dx, dweight)``; dx is also the residual's gradient.

    Args:
        grad_y: gradient of y; ``grad_h``: what reaches h besides y, or None. Both like ``h``.
        h: (..., C), the normalised input; rstd: (N,) from :func:`rms_norm_stats`.
        weight_offset: what forward added to ``weight``.
    """
    return _run_backward(grad_y, grad_h, h, weight, weight_offset, rstd)


def rms_norm_reference(
    x: Any, weight: Any = None, eps: float = 1e-6, *, weight_offset: float = 0.0, residual: Any = None
) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times."""
    h = x if residual is None else x + residual
    y = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * (weight + weight_offset)
    return y if residual is None else (y, h)


def _new_stats(x: Array) -> Array:
    width = x.shape[-1]
    count = x.numel() if is_torch(x) else x.size
    return empty(x, (count // width if width else 0,), "float32")


def _run(
    x: Array,
    residual: Any,
    weight: Any,
    eps: float,
    weight_offset: float,
    rstd: Any,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    y = empty_like(x) if out is None else out
    h = None if residual is None else empty_like(x)
    backend.extension().rms_norm_forward(rows(x), rows(residual), weight, eps, weight_offset, y, h, rstd)
    return y, h, rstd


def _run_backward(
    grad_y: Array, grad_h: Any, h: Array, weight: Any, weight_offset: float, rstd: Array
) -> tuple[Array, Array | None]:
    dx = empty_like(h)
    dweight = None if weight is None else empty_like(weight)
    backend.extension().rms_norm_backward(
        rows(grad_y), rows(grad_h), rows(h), weight, weight_offset, rstd, dx, dweight
    )
    return dx, dweight


# --- torch -------------------------------------------------------------------------------------------------
# rms_norm(x, weight, eps, weight_offset) -> (y, rstd)
# add_rms_norm(x, residual, weight, eps, weight_offset) -> (y, h, rstd)


def _forward(x: Any, weight: Any, eps: float, weight_offset: float = 0.0) -> tuple[Any, ...]:
    y, _, rstd = _run(x, None, weight, eps, weight_offset, _new_stats(x))
    return y, rstd


def _inference(x: Any, weight: Any, eps: float, weight_offset: float = 0.0) -> Any:
    return _run(x, None, weight, eps, weight_offset, None)[0]


def _eager_forward(ctx: Any, x: Any, weight: Any, eps: float, weight_offset: float = 0.0) -> Any:
    y, _, rstd = _run(x, None, weight, eps, weight_offset, _new_stats(x))
    ctx.save_for_backward(x, weight, rstd)
    ctx.weight_offset = weight_offset
    return y


def _eager_backward(ctx: Any, grad_y: Any) -> tuple[Any, ...]:
    h, weight, rstd = ctx.saved_tensors
    return *_run_backward(grad_y, None, h, weight, ctx.weight_offset, rstd), None, None


def _fake(x: Any, weight: Any, eps: float, weight_offset: float = 0.0) -> tuple[Any, ...]:
    return x.new_empty(x.shape), _new_stats(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs[0], inputs[1], output[1], inputs[3])


def _backward(ctx: Any, grad_y: Any, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, grad_y, None), None, None


def _add_forward(
    x: Any, residual: Any, weight: Any, eps: float, weight_offset: float = 0.0
) -> tuple[Any, ...]:
    return _run(x, residual, weight, eps, weight_offset, _new_stats(x))


def _add_inference(
    x: Any, residual: Any, weight: Any, eps: float, weight_offset: float = 0.0
) -> tuple[Any, ...]:
    return _run(x, residual, weight, eps, weight_offset, None)[:2]


def _add_fake(x: Any, residual: Any, weight: Any, eps: float, weight_offset: float = 0.0) -> tuple[Any, ...]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _new_stats(x)


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, output[1], inputs[2], output[2], inputs[4])


def _add_backward(ctx: Any, grad_y: Any, grad_h: Any, *_: Any) -> tuple[Any, ...]:
    dx, dweight = _gradients(ctx, grad_y, grad_h)
    return dx, dx, dweight, None, None


def _save(ctx: Any, h: Any, weight: Any, rstd: Any, weight_offset: float) -> None:
    ctx.weight_offset = weight_offset
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, rstd)


def _gradients(ctx: Any, grad_y: Any, grad_h: Any) -> tuple[Any, Any]:
    h, weight, rstd = ctx.saved_tensors
    if grad_y is None:
        if grad_h is None:
            return None, None
        grad_y = grad_h.new_zeros(grad_h.shape)
    dx, dweight = _rms_norm_backward(grad_y, grad_h, h, weight, ctx.weight_offset, rstd)
    return dx, dweight if weight is not None else None


def _backward_forward(
    grad_y: Any, grad_h: Any, h: Any, weight: Any, weight_offset: float, rstd: Any
) -> tuple[Any, Any]:
    dx, dweight = _run_backward(grad_y, grad_h, h, weight, weight_offset, rstd)
    return dx, h.new_empty((0,)) if dweight is None else dweight


def _backward_fake(
    grad_y: Any, grad_h: Any, h: Any, weight: Any, weight_offset: float, rstd: Any
) -> tuple[Any, Any]:
    return h.new_empty(h.shape), h.new_empty((0,)) if weight is None else weight.new_empty(weight.shape)


_rms_norm_backward = TorchOp(
    "rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor? weight, float weight_offset, Tensor rstd)"
    " -> (Tensor, Tensor)",
    forward=_backward_forward,
    fake=_backward_fake,
    inference=_run_backward,
)
_rms_norm = TorchOp(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps, float weight_offset=0.0) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    inference=_inference,
    eager_forward=_eager_forward,
    eager_backward=_eager_backward,
)
_add_rms_norm = TorchOp(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset=0.0)"
    " -> (Tensor, Tensor, Tensor)",
    forward=_add_forward,
    fake=_add_fake,
    setup_context=_add_setup,
    backward=_add_backward,
    inference=_add_inference,
)
