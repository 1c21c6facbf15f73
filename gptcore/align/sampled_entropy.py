"""Entropies of the distributions that tokens are sampled from, differentiable, and never a vocabulary for each token.

Backward makes the logits of a block of tokens anew, and with them the slopes: with H the entropy of p = softmax(z),
dH/dz_v = -p_v (log p_v + H). So O(R) numbers are kept between forward and backward, never R·V.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcore.align.kept_logits import Logits

_BLOCK = 1 << 22  # entries of a block of logits: 16 MB in f32


def entropies(
    x: Tensor, weight: Tensor, logits: Logits, temperature: float, *, known: Tensor | None = None
) -> Tensor:
    """(R,) nats, f32 at least: of the softmax at ``temperature`` over the whole vocabulary, differentiable once.

    Args:
        x: (R, C) what the head reads at each response token. weight: (V, C), with the bias of ``logits`` (V,).
        temperature: above 0. known: (R,) the entropies, where a kernel has them already.
    """
    return _Entropies.apply(x, weight, logits.bias, logits.scale, logits.cap, temperature, known)


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None,
        temperature: float, known: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.settings = scale, cap, temperature
        if known is None:
            known = x.new_empty(x.shape[0], dtype=_computed(x))
            for rows in _blocks(x.shape[0], weight.shape[0]):
                log_p = _log_softmax(x[rows], weight, bias, *ctx.settings)[0]
                known[rows] = -_times(log_p.exp(), log_p).sum(-1)
        ctx.save_for_backward(x, weight, bias, known)
        return known.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, entropy = ctx.saved_tensors
        kind = _computed(x)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=kind)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=kind)
        whole = weight.to(kind)
        for rows in _blocks(x.shape[0], weight.shape[0]):
            log_p, slope = _log_softmax(x[rows], weight, bias, *ctx.settings)
            p = log_p.exp()
            dz = _times(p, log_p + entropy[rows, None]).mul_(-grad[rows, None]) * slope
            dx[rows] = (dz @ whole).to(x.dtype)
            dweight.addmm_(dz.t(), x[rows].to(kind))
            if dbias is not None:
                dbias += dz.sum(0)
        given = None if bias is None or dbias is None else dbias.to(bias.dtype)
        return dx, dweight.to(weight.dtype), given, None, None, None, None


def _log_softmax(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, temperature: float
) -> tuple[Tensor, Tensor | float]:
    """(r, V) log-probabilities, and the slope of the scaled logits in the head's products."""
    kind = _computed(x)
    z = x.to(kind) @ weight.to(kind).t()
    if bias is not None:
        z += bias.to(kind)
    z *= scale
    slope: Tensor | float = scale / temperature
    if cap is not None:
        bent = torch.tanh(z / cap)
        z, slope = cap * bent, slope * (1.0 - bent * bent)
    return (z / temperature).log_softmax(-1), slope


def _times(p: Tensor, factor: Tensor) -> Tensor:
    """p * factor, 0 where p is: a token barred by a bias of -inf has a logarithm that is not finite."""
    return torch.where(p > 0, p * factor, 0.0)


def _computed(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(count: int, vocab: int) -> Iterator[slice]:
    size = max(1, _BLOCK // vocab)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
