"""Adam over many tensors in one call: global norm and check, then clip, unscale, update and bf16 copy."""

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


def adamw_(
    params: Sequence[Array],
    grads: Sequence[Array],
    exp_avgs: Sequence[Array],
    exp_avg_sqs: Sequence[Array],
    *,
    step: Number | None = None,
    lr: Number,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    copies: Sequence[Array] | None = None,
    max_norm: float | None = None,
    grad_scale: Number = 1.0,
    max_exp_avg_sqs: Sequence[Array] | None = None,
    lows: Sequence[Array] | None = None,
    decoupled: bool = True,
    maximize: bool = False,
    grad_norm: Number | None = None,
    steps: Sequence[Array] | None = None,
    out: Results | None = None,
) -> Results:
    """One step in place: ``p = p (1 - lr wd) - lr m^ / (sqrt(v^) + eps)`` with the bias-corrected moments.

    Two passes: the first reads the gradients for their global norm and for infinities and NaN, the second
    updates. Where a gradient is not finite, nothing is written. ``decoupled=False`` is Adam: the decay is added
    to the gradient, ``g + wd p``, after the clip.

    Args:
        params: f32, contiguous; torch tensors, NumPy or CuPy arrays. Not differentiable.
        grads: f32 or bf16, each like its parameter; not changed by clipping or unscaling.
        exp_avgs, exp_avg_sqs: f32 moments m and v, like the parameters.
        step: number of this update, from 1, for the bias correction; None: one more than ``steps`` say.
        lr, beta1, beta2, eps: as in the paper.
        weight_decay: one number or one per parameter.
        copies: bf16, like the parameters: overwritten with their rounding, as the weights that a model
            computes with beside its f32 masters.
        max_norm: the norm of all gradients together, after unscaling, is clipped to this.
        grad_scale: gradients are divided by it first (a loss scale, or the number of micro-batches).
        max_exp_avg_sqs: f32, like the parameters: AMSGrad's running maximum of v, which then takes v's place
            in the denominator.
        lows: int16, like the parameters, which are bf16 then: together they are f32 numbers, whose bits are
            ``(parameter << 16) + low``. Two bytes a parameter less than masters with copies; the same
            numbers bit for bit, and as parameters their rounding to nearest, ties away from zero. Start
            with zeros, or with :func:`split_master`.
        decoupled: False adds the decay to the gradient (L2) instead of taking it from the parameter.
        maximize: ascend: the gradient's sign is turned before anything else.
        grad_norm: the norm, where :func:`gptcore.ops.grad_norm` has told it of this and other calls'
            gradients together and found them finite; the first pass is left out then.
        steps: one f32 element per parameter, overwritten with ``step``: the count that torch's optimizers keep
            in their state, for less than a call of torch would take. Where nothing is written, they are not.
        out: two arrays of one element, f64 and bool, beside the gradients: overwritten with the result and returned
            in place of numbers. Gradients on a GPU have new ones made.

    ``step``, ``lr``, ``grad_scale`` and ``grad_norm`` may also be arrays of one element (f32, f64 or int64). On a GPU
    kernels alone read those, so nothing waits for it and a graph can capture the call. Where an array ``grad_norm`` is
    not finite, that is ``found_inf``.

    Returns:
        ``(grad_norm, found_inf)``: the norm after unscaling and before clipping; whether a gradient was inf
        or NaN.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or numbers that do not fit; nothing is written then.

    Source: Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Kingma, Ba 2015,
    "Adam", algorithm 1; AMSGrad as torch has it: Reddi et al. 2018, "On the Convergence of Adam and Beyond",
    algorithm 2, with bias correction. The clip is that of torch.nn.utils.clip_grad_norm_.
    """
    decays = per_parameter(weight_decay, len(params))
    out = results_for(grads, out)
    result = backend.extension().adamw(
        params, () if lows is None else lows, grads, exp_avgs, exp_avg_sqs,
        () if max_exp_avg_sqs is None else max_exp_avg_sqs, () if copies is None else copies,
        () if steps is None else steps, decays, step, lr, beta1, beta2, eps, decoupled, maximize, max_norm,
        grad_scale, grad_norm, *(out or (None, None)),
    )  # fmt: skip
    return result if out is None else out


def adamw_reference(
    params: Sequence[Any],
    grads: Sequence[Any],
    exp_avgs: Sequence[Any],
    exp_avg_sqs: Sequence[Any],
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    copies: Sequence[Any] | None = None,
    max_norm: float | None = None,
    grad_scale: float = 1.0,
    max_exp_avg_sqs: Sequence[Any] | None = None,
    lows: Sequence[Any] | None = None,
    decoupled: bool = True,
    maximize: bool = False,
    grad_norm: float | None = None,
    steps: Sequence[Any] | None = None,
) -> tuple[float, bool]:
    """The same in plain torch, in place, any floating dtype."""
    weights = params
    if lows is not None:
        params = [join_master(weight, low) for weight, low in zip(weights, lows, strict=True)]
    decays = per_parameter(weight_decay, len(params))
    norm, found_inf = (grad_norm, False) if grad_norm is not None else grad_norm_reference(grads, grad_scale)
    if found_inf:
        return norm, True
    factor = clip_factor(norm, max_norm, grad_scale)
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = g.to(p.dtype) * (-factor if maximize else factor)
        if not decoupled:
            g = g + p * decays[i]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w = v
        if max_exp_avg_sqs is not None:
            w = max_exp_avg_sqs[i].copy_(max_exp_avg_sqs[i].maximum(v))
        denominator = (w / (1 - beta2**step)).sqrt() + eps
        p.mul_(1 - lr * decays[i] if decoupled else 1).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
        if copies is not None:
            copies[i].copy_(p)
        if steps is not None:
            steps[i].fill_(step)
        if lows is not None:
            for half, new in zip((weights[i], lows[i]), split_master(p), strict=True):
                half.copy_(new)
    return norm, False


def split_master(master: Any) -> tuple[Any, Any]:
    """f32 numbers as bf16 weights, rounded to nearest with ties away from zero, and int16 remainders.

    Torch tensors. :func:`join_master` gives every finite number and both infinities back, bit for bit;
    NaN becomes a quiet NaN. Ties go away from zero because 65537 numbers round to an even weight under
    ties-to-even, and 16 bits tell 65536 apart.
    """
    import torch

    bits = master.detach().contiguous().view(torch.int32)
    nan = master.isnan()
    weight = torch.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16).to(torch.int16)
    low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000  # modulo 2^16 the difference is the lower half itself
    return weight.view(torch.bfloat16), torch.where(nan, 0, low).to(torch.int16)


def join_master(weight: Any, low: Any) -> Any:
    """The f32 numbers of :func:`split_master`. A zero weight with a negative remainder is zero."""
    import torch

    upper = weight.detach().contiguous().view(torch.int16).to(torch.int32) << 16
    rest = torch.where((upper << 1 == 0) & (low < 0), 0, low.to(torch.int32))
    return (upper + rest).view(torch.float32)
