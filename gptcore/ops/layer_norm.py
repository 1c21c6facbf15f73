"""Layer normalisation over the last dimension, with an optional residual add in front."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty, empty_like, is_torch, rows
from gptcore.ops.registration import TorchOp, refuse_out_with_grad


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    residual: Array | None = None,
    out: Array | None = None,
) -> Any:
    """``y = (h - mean(h)) / sqrt(var(h) + eps) * (weight + weight_offset) + bias`` with ``h = x + residual``.

    Args:
        x: (..., C), f32 or bf16; torch tensor (differentiable), NumPy or CuPy array.
        weight, bias: (C,), f32 or bf16 (both of one type), or None.
        eps: added to the variance.
        weight_offset: added to ``weight``, in f32: 1 for a zero-centred weight, whose zero is the identity. Needs
            a weight.
        residual: like ``x``; added first, and the sum is returned too (a pre-LN block needs both).
        out: where to write ``y``; shape and dtype of ``x``. Not differentiable.

    Returns:
        ``y``, shape and dtype of ``x``; with ``residual``, the pair ``(y, h)``, h rounded to x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; nothing is written then.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", section 3. Statistics are f32 whatever the dtype.
    """
    if out is None:
        if residual is None:
            y = _layer_norm(x, weight, bias, eps, weight_offset)
            return y[0] if type(y) is tuple else y
        return _add_layer_norm(x, residual, weight, bias, eps, weight_offset)[:2]
    if residual is None:
        plain = backend.extension().layer_norm_plain(x, weight, bias, eps, weight_offset, out)
        if plain is not None:
            return plain
    refuse_out_with_grad("layer_norm", x, residual, weight, bias)
    y, h, _ = _run(x, residual, weight, bias, eps, weight_offset, None, out)
    return y if residual is None else (y, h)


def layer_norm_stats(x: Array, eps: float = 1e-5) -> Array:
    """Mean and reciprocal deviation of each row of ``x`` (..., C): (2, N) f32, as backward wants them."""
    return _run(x, None, None, None, eps, 0.0, _new_stats(x))[2]


def layer_norm_backward(
    grad_y: Array,
    h: Array,
    weight: Array | None,
    stats: Array,
    *,
    weight_offset: float = 0.0,
    grad_h: Array | None = None,
    has_bias: bool = True,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of :func:`layer_norm`: ``(dx, dweight, dbias)``; dx is also the residual's gradient.

    Args:
        grad_y: gradient of y; ``grad_h``: what reaches h besides y, or None. Both like ``h``.
        h: (..., C), the normalised input; stats: (2, N) from :func:`layer_norm_stats`.
        weight_offset: what forward added to ``weight``.
        has_bias: whether dbias is wanted; without ``weight`` both gradients are None.
    """
    want_bias = has_bias and weight is not None
    return _run_backward(grad_y, grad_h, h, weight, weight_offset, stats, want_bias)


def layer_norm_reference(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    residual: Any = None,
) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times."""
    h = x if residual is None else x + residual
    centred = h - h.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * (weight + weight_offset)
    if bias is not None:
        y = y + bias
    return y if residual is None else (y, h)


def _new_stats(x: Array) -> Array:
    width = x.shape[-1]
    count = x.numel() if is_torch(x) else x.size
    return empty(x, (2, count // width if width else 0), "float32")


def _run(
    x: Array,
    residual: Any,
    weight: Any,
    bias: Any,
    eps: float,
    weight_offset: float,
    stats: Any,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    y = empty_like(x) if out is None else out
    h = None if residual is None else empty_like(x)
    backend.extension().layer_norm_forward(
        rows(x), rows(residual), weight, bias, eps, weight_offset, y, h, stats
    )
    return y, h, stats


def _run_backward(
    grad_y: Array, grad_h: Any, h: Array, weight: Any, weight_offset: float, stats: Array, want_bias: bool
) -> tuple[Array, Array | None, Array | None]:
    dx = empty_like(h)
    dweight = None if weight is None else empty_like(weight)
    dbias = None
    if want_bias:
        dbias = empty(h, (h.shape[-1],)) if weight is None else empty_like(weight)
    backend.extension().layer_norm_backward(
        rows(grad_y), rows(grad_h), rows(h), weight, weight_offset, stats, dx, dweight, dbias
    )
    return dx, dweight, dbias


# --- torch -------------------------------------------------------------------------------------------------
# layer_norm(x, weight, bias, eps, weight_offset) -> (y, stats)
# add_layer_norm(x, residual, weight, bias, eps, weight_offset) -> (y, h, stats)


def _forward(x: Any, weight: Any, bias: Any, eps: float, weight_offset: float = 0.0) -> tuple[Any, ...]:
    y, _, stats = _run(x, None, weight, bias, eps, weight_offset, _new_stats(x))
    return y, stats


def _inference(x: Any, weight: Any, bias: Any, eps: float, weight_offset: float = 0.0) -> Any:
    plain = backend.extension().layer_norm_plain(x, weight, bias, eps, weight_offset, None)
    return _run(x, None, weight, bias, eps, weight_offset, None)[0] if plain is None else plain


def _fake(x: Any, weight: Any, bias: Any, eps: float, weight_offset: float = 0.0) -> tuple[Any, ...]:
    return x.new_empty(x.shape), _new_stats(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs[0], inputs[1], output[1], inputs[4])


def _backward(ctx: Any, grad_y: Any, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, grad_y, None, ctx.needs_input_grad[2]), None, None


def _add_forward(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, weight_offset: float = 0.0
) -> tuple[Any, ...]:
    return _run(x, residual, weight, bias, eps, weight_offset, _new_stats(x))


def _add_inference(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, weight_offset: float = 0.0
) -> tuple[Any, ...]:
    return _run(x, residual, weight, bias, eps, weight_offset, None)[:2]


def _add_fake(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, weight_offset: float = 0.0
) -> tuple[Any, ...]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _new_stats(x)


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, output[1], inputs[2], output[2], inputs[5])


def _add_backward(ctx: Any, grad_y: Any, grad_h: Any, *_: Any) -> tuple[Any, ...]:
    dx, dweight, dbias = _gradients(ctx, grad_y, grad_h, ctx.needs_input_grad[3])
    return dx, dx, dweight, dbias, None, None


def _save(ctx: Any, h: Any, weight: Any, stats: Any, weight_offset: float) -> None:
    ctx.weight_offset = weight_offset
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, stats)


def _gradients(ctx: Any, grad_y: Any, grad_h: Any, want_bias: bool) -> tuple[Any, Any, Any]:
    h, weight, stats = ctx.saved_tensors
    if grad_y is None:
        if grad_h is None:
            return None, None, None
        grad_y = grad_h.new_zeros(grad_h.shape)
    dx, dweight, dbias = _layer_norm_backward(grad_y, grad_h, h, weight, ctx.weight_offset, stats, want_bias)
    return dx, dweight if weight is not None else None, dbias if want_bias else None


def _backward_forward(
    grad_y: Any, grad_h: Any, h: Any, weight: Any, weight_offset: float, stats: Any, want_bias: bool
) -> tuple[Any, Any, Any]:
    dx, dweight, dbias = _run_backward(grad_y, grad_h, h, weight, weight_offset, stats, want_bias)
    return (
        dx,
        h.new_empty((0,)) if dweight is None else dweight,
        h.new_empty((0,)) if dbias is None else dbias,
    )


def _backward_fake(
    grad_y: Any, grad_h: Any, h: Any, weight: Any, weight_offset: float, stats: Any, want_bias: bool
) -> tuple[Any, Any, Any]:
    like = h if weight is None else weight
    dweight = h.new_empty((0,)) if weight is None else weight.new_empty(weight.shape)
    dbias = like.new_empty((h.shape[-1],)) if want_bias else h.new_empty((0,))
    return h.new_empty(h.shape), dweight, dbias


_layer_norm_backward = TorchOp(
    "layer_norm_backward",
    "(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor? weight, float weight_offset, Tensor stats, bool want_bias)"
    " -> (Tensor, Tensor, Tensor)",
    forward=_backward_forward,
    fake=_backward_fake,
    inference=_run_backward,
)
_layer_norm = TorchOp(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset=0.0) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    inference=_inference,
    native_hooks=True,
)
_add_layer_norm = TorchOp(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset=0.0)"
    " -> (Tensor, Tensor, Tensor)",
    forward=_add_forward,
    fake=_add_fake,
    setup_context=_add_setup,
    backward=_add_backward,
    inference=_add_inference,
)
