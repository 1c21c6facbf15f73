"""SGD with momentum over many tensors in one call: norm and check, then clip, unscale, update, bf16 copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array
from gptcore.ops.grad_norm import (
    Number,
    Results,
    clip_factor,
    grad_norm_reference,
    per_parameter,
    results_for,
)


def sgd_(
    params: Sequence[Array],
    grads: Sequence[Array],
    momentum_buffers: Sequence[Array] | None = None,
    *,
    lr: Number,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | Sequence[float] = 0.0,
    first: bool | Sequence[bool] = False,
    copies: Sequence[Array] | None = None,
    maximize: bool = False,
    max_norm: float | None = None,
    grad_scale: Number = 1.0,
    grad_norm: Number | None = None,
    check_finite: bool = True,
    out: Results | None = None,
) -> Results:
    """One step in place: ``b = momentum b + (1 - dampening) (g + wd p)``, ``p = p - lr b``.

    With ``nesterov`` the step is ``g + wd p + momentum b``. Two passes, as in :func:`gptcore.ops.adamw_`:
    the first reads the gradients for their norm and for infinities and NaN, the second updates. Where a
    gradient is not finite, nothing is written.

    Args:
        params: f32, contiguous; torch tensors, NumPy or CuPy arrays. Not differentiable.
        grads: f32 or bf16, each like its parameter; not changed by clipping or unscaling.
        momentum_buffers: b, f32, like the parameters; None for plain descent, momentum 0.
        lr: learning rate, >= 0.
        momentum: >= 0. dampening: in [0, 1]. nesterov: needs a momentum and dampening 0.
        weight_decay: L2 in the gradient, added after the clip; one number or one per parameter.
        first: one or one per parameter: its buffer holds nothing yet and becomes the gradient.
        copies: bf16, like the parameters: overwritten with their rounding.
        maximize: ascend: the gradient's sign is turned before anything else.
        max_norm: the norm of all gradients together, after unscaling, is clipped to this.
        grad_scale: gradients are divided by it first (a loss scale, or the number of micro-batches).
        grad_norm: the norm, where :func:`gptcore.ops.grad_norm` has told it and found the gradients finite.
        check_finite: False leaves out the first pass, unless max_norm needs it: 4 of 24 bytes a parameter.
        out: two arrays of one element, f64 and bool, beside the gradients: overwritten with the result and returned
            in place of numbers. Gradients on a GPU have new ones made.

    ``lr``, ``grad_scale`` and ``grad_norm`` may also be arrays of one element (f32, f64 or int64). On a GPU kernels
    alone read those, so nothing waits for it and a graph can capture the call. Where an array ``grad_norm`` is not
    finite, that is ``found_inf``.

    Returns:
        ``(grad_norm, found_inf)``: the norm after unscaling and before clipping, None where nothing took it;
        whether a gradient was inf or NaN.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or numbers that do not fit; nothing is written then.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", in the
    form of torch.optim.SGD (the learning rate outside the momentum).
    """
    count = len(params)
    decays, fresh = per_parameter(weight_decay, count), per_parameter(first, count)
    normed = check_finite or max_norm is not None or grad_norm is not None
    out = results_for(grads, out) if normed else None
    result = backend.extension().sgd(
        params, grads, () if momentum_buffers is None else momentum_buffers, () if copies is None else copies,
        decays, fresh, lr, momentum, dampening, nesterov, maximize, max_norm, grad_scale, grad_norm,
        check_finite, *(out or (None, None)),
    )  # fmt: skip
    return result if out is None else out


def sgd_reference(
    params: Sequence[Any],
    grads: Sequence[Any],
    momentum_buffers: Sequence[Any] | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | Sequence[float] = 0.0,
    first: bool | Sequence[bool] = False,
    copies: Sequence[Any] | None = None,
    maximize: bool = False,
    max_norm: float | None = None,
    grad_scale: float = 1.0,
    grad_norm: float | None = None,
    check_finite: bool = True,
) -> tuple[float | None, bool]:
    """The same in plain torch, in place, any floating dtype."""
    count = len(params)
    decays, fresh = per_parameter(weight_decay, count), per_parameter(first, count)
    norm = grad_norm
    if norm is None and (check_finite or max_norm is not None):
        norm, found_inf = grad_norm_reference(grads, grad_scale)
        if found_inf:
            return norm, True
    factor = clip_factor(norm, max_norm, grad_scale)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        update = g.to(p.dtype) * (-factor if maximize else factor) + p * decays[i]
        if momentum_buffers is not None:
            b = momentum_buffers[i]
            b.copy_(update if fresh[i] else momentum * b + (1 - dampening) * update)
            update = update + momentum * b if nesterov else b
        p.sub_(lr * update)
        if copies is not None:
            copies[i].copy_(p)
    return norm, False
