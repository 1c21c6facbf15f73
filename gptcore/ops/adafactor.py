"""Adafactor over many tensors in one call, with the choices in which its implementations differ."""

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


def adafactor_(
    params: Sequence[Array],
    grads: Sequence[Array],
    row_vars: Sequence[Array | None],
    col_vars: Sequence[Array | None],
    variances: Sequence[Array | None],
    *,
    step_size: Number,
    beta2: Number,
    eps: tuple[float, float] = (1e-30, 1e-3),
    eps_added: bool = True,
    clip_threshold: float | None = 1.0,
    scale_parameter: bool = True,
    weight_decay: float | Sequence[float] = 0.0,
    scaled_decay: bool = False,
    exp_avgs: Sequence[Array] | None = None,
    beta1: float = 0.0,
    maximize: bool = False,
    copies: Sequence[Array] | None = None,
    max_norm: float | None = None,
    grad_scale: Number = 1.0,
    grad_norm: Number | None = None,
    decay_factor: Number = 1.0,
    steps: Sequence[Array] | None = None,
    out: Results | None = None,
) -> Results:
    """One step in place: ``p = p (1 - wd) - a U``, U the gradient over the root of a factored second moment.

    For matrices (the last two dimensions, of n x m) the second moment V is kept as the running means of the
    squared gradient over rows, R of n, and over columns, C of m: ``V = R C / mean(R)``. Then
    ``U = g / sqrt(V)``, ``U = U / max(1, RMS(U) / clip_threshold)``, and ``a = step_size max(eps[1], RMS(p))``.

    Where a gradient is not finite, nothing is written.

    Args:
        params: f32, contiguous; torch tensors, NumPy or CuPy arrays. Not differentiable.
        grads: f32 or bf16, each like its parameter; not changed.
        row_vars, col_vars: f32 of shapes (..., n, 1) and (..., 1, m) for a parameter (..., n, m); None where
            the parameter has a variance.
        variances: f32 like the parameter, its whole second moment; None where it is factored. Parameters
            of fewer than two dimensions need one.
        step_size: the relative step, before the parameter's scale.
        beta2: decay of the second moment at this step; 0 at the first.
        eps: (regularisation of the second moment, least scale of a parameter).
        eps_added: eps[0] is added to the squared gradient (the paper). False holds mean(R) above eps[0] and V
            above eps[0]² (torch).
        clip_threshold: the root mean square of an update is at most this; None for no such clip.
        scale_parameter: scale the step by the parameter's root mean square; False takes step_size as it is.
        weight_decay: share of the parameter that is taken away, one number or one per parameter: times the
            learning rate already, or with ``scaled_decay`` times a here.
        exp_avgs: f32 like the parameters: averages a U with ``beta1``, and the average is what is subtracted.
        maximize: add the update instead.
        copies: bf16, like the parameters: overwritten with their rounding.
        max_norm: the norm of all gradients together, after unscaling, is clipped to this.
        grad_scale: gradients are divided by it first (a loss scale, or the number of micro-batches).
        grad_norm: the norm, where :func:`gptcore.ops.grad_norm` has told it of this and other calls'
            gradients together and found them finite.
        decay_factor: multiplies every weight decay.
        steps: one f32 element per parameter, one more where the update is applied.
        out: two arrays of one element, f64 and bool, beside the gradients: overwritten with the result and returned
            in place of numbers. Gradients on a GPU have new ones made.

    ``step_size``, ``beta2``, ``decay_factor``, ``grad_scale`` and ``grad_norm`` may also be arrays of one element (f32,
    f64 or int64). On a GPU kernels alone read those, so nothing waits for it and a graph can capture the call, and the
    first two may be of one f64 for each parameter. Where an array ``grad_norm`` is not finite, that is ``found_inf``.

    Returns:
        ``(grad_norm, found_inf)``: the norm after unscaling and before clipping; whether a gradient was inf
        or NaN.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or numbers that do not fit; nothing is written then.

    Source: Shazeer, Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", algorithms
    4 and 5. :class:`gptcore.optim.Adafactor` names the choices of its implementations.
    """
    decays = per_parameter(weight_decay, len(params))
    out = results_for(grads, out)
    result = backend.extension().adafactor(
        params, grads, row_vars, col_vars, variances, () if exp_avgs is None else exp_avgs,
        () if copies is None else copies, decays, step_size, beta2, beta1, *eps, eps_added, clip_threshold,
        scale_parameter, scaled_decay, maximize, max_norm, grad_scale, grad_norm, decay_factor,
        () if steps is None else steps, *(out or (None, None)),
    )  # fmt: skip
    return result if out is None else out


def adafactor_reference(
    params: Sequence[Any],
    grads: Sequence[Any],
    row_vars: Sequence[Any],
    col_vars: Sequence[Any],
    variances: Sequence[Any],
    *,
    step_size: float,
    beta2: float,
    eps: tuple[float, float] = (1e-30, 1e-3),
    eps_added: bool = True,
    clip_threshold: float | None = 1.0,
    scale_parameter: bool = True,
    weight_decay: float | Sequence[float] = 0.0,
    scaled_decay: bool = False,
    exp_avgs: Sequence[Any] | None = None,
    beta1: float = 0.0,
    maximize: bool = False,
    copies: Sequence[Any] | None = None,
    max_norm: float | None = None,
    grad_scale: float = 1.0,
    grad_norm: float | None = None,
) -> tuple[float, bool]:
    """The same in plain torch, in place, any floating dtype."""
    norm, found_inf = (grad_norm, False) if grad_norm is not None else grad_norm_reference(grads, grad_scale)
    if found_inf:
        return norm, True
    factor = clip_factor(norm, max_norm, grad_scale)
    decays = per_parameter(weight_decay, len(params))
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if not p.numel():
            continue
        g = g.to(p.dtype) * factor
        added, floor = (eps[0], 0.0) if eps_added else (0.0, eps[0])
        update = g / _estimate(g.square() + added, row_vars[i], col_vars[i], variances[i], beta2, floor)
        if clip_threshold is not None:
            update = update / (_rms(update) / clip_threshold).clamp(min=1.0)
        step = step_size * max(eps[1], _rms(p).item()) if scale_parameter else step_size
        update = update * (-step if maximize else step)
        if exp_avgs is not None:
            update = exp_avgs[i].mul_(beta1).add_(update, alpha=1 - beta1)
        p.mul_(1 - decays[i] * (step if scaled_decay else 1.0)).sub_(update)
        if copies is not None:
            copies[i].copy_(p)
    return norm, False


def _estimate(square: Any, row_var: Any, col_var: Any, variance: Any, beta2: float, floor: float) -> Any:
    """Moves the second moment on and returns its root."""
    if variance is not None:
        variance.mul_(beta2).add_(square, alpha=1 - beta2)
        return variance.clamp(min=floor * floor).sqrt()
    row_var.mul_(beta2).add_(square.mean(dim=-1, keepdim=True), alpha=1 - beta2)
    col_var.mul_(beta2).add_(square.mean(dim=-2, keepdim=True), alpha=1 - beta2)
    estimate = row_var * col_var / row_var.mean(dim=-2, keepdim=True).clamp(min=floor)
    return estimate.clamp(min=floor * floor).sqrt()


def _rms(x: Any) -> Any:
    return x.square().mean().sqrt()
