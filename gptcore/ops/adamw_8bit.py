"""AdamW with moments of 8 bits, quantised in blocks of 256, over many tensors in one call."""

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
from gptcore.ops.philox import philox_reference

BLOCK = 256


def adamw_8bit_(
    params: Sequence[Array],
    grads: Sequence[Array],
    exp_avgs: Sequence[Array],
    exp_avg_scales: Sequence[Array],
    exp_avg_sqs: Sequence[Array],
    exp_avg_sq_scales: Sequence[Array],
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
    maximize: bool = False,
    grad_norm: Number | None = None,
    seed: int = 0,
    places: Sequence[tuple[int, int]] | None = None,
    steps: Sequence[Array] | None = None,
    out: Results | None = None,
) -> Results:
    """One step of AdamW in place; between steps each moment is a code of 8 bits times its block's scale.

    A block is 256 neighbours in memory; its scale is their largest magnitude. The parameter is updated with the
    moments before they are rounded to codes. 2 + 8/256 bytes of state a parameter.

    Where a gradient is not finite, nothing is written.

    Args:
        params: f32, or all bf16, contiguous; torch tensors, NumPy or CuPy arrays. Not differentiable. bf16
            parameters have no master: the new value is rounded up or down with odds by its distance to
            either, so that steps below a unit in the last place add up.
        grads: f32 or bf16, each like its parameter; not changed.
        exp_avgs, exp_avg_sqs: u8 codes of m and v like the parameters, see :func:`dynamic_map`. Zero is code 127
            of m and 0 of v; begin with scales of 0, under which codes do not matter.
        exp_avg_scales, exp_avg_sq_scales: f32 of (ceil(N / 256),) for N elements.
        step: number of this update, from 1, for the bias correction; None: one more than ``steps`` say.
        lr, beta1, beta2, eps: as in Adam.
        weight_decay: decoupled, one number or one per parameter.
        copies: bf16, like f32 parameters: overwritten with their rounding.
        max_norm: the norm of all gradients together, after unscaling, is clipped to this.
        grad_scale: gradients are divided by it first (a loss scale, or the number of micro-batches).
        maximize: ascend.
        grad_norm: the norm, where :func:`gptcore.ops.grad_norm` has told it of this and other calls'
            gradients together and found them finite.
        seed: of the rounding of bf16 parameters, 0 to 2^64 - 1; the bits depend on it, on step and on the
            element's place alone.
        places: of each parameter a number below 2^32 and where it begins, a multiple of 256 elements: what is a slice
            of a larger parameter is rounded as it would be there. Default: positions in the list, and 0.
        steps: one f32 element per parameter, overwritten with ``step`` where the update is applied.
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

    Source: Dettmers, Lewis, Shleifer, Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization",
    section 2; Loshchilov, Hutter 2019, algorithm 2; stochastic rounding: Gupta et al. 2015, "Deep Learning with
    Limited Numerical Precision", section 3, by Philox4x32-10 (Salmon et al. 2011).
    """
    decays = per_parameter(weight_decay, len(params))
    out = results_for(grads, out)
    result = backend.extension().adamw_8bit(
        params, grads, exp_avgs, exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales,
        () if copies is None else copies, () if steps is None else steps, decays, step, lr, beta1, beta2, eps,
        maximize, max_norm, grad_scale, grad_norm, seed, () if places is None else places, *(out or (None, None)),
    )  # fmt: skip
    return result if out is None else out


def dynamic_map(signed: bool) -> list[float]:
    """The 256 values that codes stand for, in order: of both signs (m), or none below zero (v).

    Seven decades down from 1, each with twice as many values as the one below, equally spaced; and 0 and 1. m has no
    -1, so that 0 has a code.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        ten = 10.0 ** (decade - 6)
        positive = [ten * (0.1 + 0.9 * (k + 0.5) / count) for k in range(count)]
        values += positive + ([-x for x in positive] if signed else [])
    return sorted(values)


def dequantise_reference(codes: Any, scales: Any, signed: bool) -> Any:
    """What codes and scales stand for, in the scales' dtype and the codes' shape; plain torch."""
    import torch

    values = torch.tensor(dynamic_map(signed), dtype=scales.dtype)[codes.view(-1).long()]
    return (values * scales.repeat_interleave(BLOCK)[: values.numel()]).view(codes.shape)


def quantise_reference(x: Any, codes: Any, scales: Any, signed: bool) -> None:
    """Writes the nearest codes of ``x`` and their scales; plain torch, any floating dtype."""
    import torch

    values = torch.tensor(dynamic_map(signed), dtype=x.dtype)
    padded = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    largest = padded.abs().amax(dim=1) if padded.numel() else padded.new_zeros(0)
    largest = torch.where(largest >= 1e-37, largest, torch.zeros_like(largest))
    normal = torch.where(largest[:, None] > 0, padded / largest[:, None], torch.zeros_like(padded))
    nearest = torch.bucketize(normal.view(-1)[: x.numel()], (values[1:] + values[:-1]) / 2, right=True)
    codes.copy_(nearest.view(codes.shape))
    scales.copy_(largest)


def adamw_8bit_reference(
    params: Sequence[Any],
    grads: Sequence[Any],
    exp_avgs: Sequence[Any],
    exp_avg_scales: Sequence[Any],
    exp_avg_sqs: Sequence[Any],
    exp_avg_sq_scales: Sequence[Any],
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
    maximize: bool = False,
    grad_norm: float | None = None,
    seed: int = 0,
    places: Sequence[tuple[int, int]] | None = None,
) -> tuple[float, bool]:
    """The same in plain torch, in place, computing in the dtype of the scales, up to float64."""
    import torch

    norm, found_inf = (grad_norm, False) if grad_norm is not None else grad_norm_reference(grads, grad_scale)
    if found_inf:
        return norm, True
    factor = clip_factor(norm, max_norm, grad_scale)
    decays = per_parameter(weight_decay, len(params))
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        states = (exp_avgs[i], exp_avg_scales[i]), (exp_avg_sqs[i], exp_avg_sq_scales[i])
        dtype = exp_avg_scales[i].dtype
        g = g.to(dtype) * (-factor if maximize else factor)
        m = dequantise_reference(*states[0], signed=True).lerp(g, 1 - beta1)
        v = dequantise_reference(*states[1], signed=False) * beta2 + g * g * (1 - beta2)
        update = m / ((v / (1 - beta2**step)).sqrt() + eps) * (lr / (1 - beta1**step))
        new = p.to(dtype) * (1 - lr * decays[i]) - update
        if p.dtype == torch.bfloat16:
            number, start = (i, 0) if places is None else places[i]
            bits = random_bits_reference(seed, step, number, start + p.numel())
            new = round_reference(new.float(), bits[start:])
        p.copy_(new)
        quantise_reference(m, *states[0], signed=True)
        quantise_reference(v, *states[1], signed=False)
        if copies is not None:
            copies[i].copy_(p)
    return norm, False


def round_reference(x: Any, bits: Any) -> Any:
    """f32 to bf16: up where the lower half of a number, as an integer, and 16 random bits reach 2^16."""
    import torch

    up = (x.view(torch.int32) + bits.view(x.shape).int()) & -65536
    return torch.where(x.isfinite(), up.view(torch.float32), x).bfloat16()


def random_bits_reference(seed: int, step: int, tensor: int, size: int) -> Any:
    """The 16 random bits of each element of the tensor of this number; int64, plain torch."""
    import torch

    blocks = -(-size // BLOCK)
    counters = torch.zeros(blocks * BLOCK // 8, 4, dtype=torch.int64)
    counters[:, 0] = torch.arange(len(counters))
    counters[:, 2], counters[:, 3] = tensor, step
    words = philox_reference(counters, seed).view(blocks, BLOCK // 2)
    return torch.cat([words & 0xFFFF, words >> 16], dim=1).view(-1)[:size]
