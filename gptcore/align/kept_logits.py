"""Log-probabilities within the sets of tokens that truncated sampling kept: a few rows of the head per token.

With K ids kept for R tokens, forward and backward cost O(K·C) and keep O(K); where the sets are a good part of the
vocabulary whole logits are cheaper, and are made for a block of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 22  # entries of a block of products or logits: 16 MB
_DENSE = 16  # a product by columns is about so many times cheaper per entry than one by gathered rows


class KeptSets(NamedTuple):
    """ids: (K,) int64 tokens kept. rows: (K,) int64 the response token each belongs to, rising. sampled: (R,) int64
    where in these the sampled tokens stand."""

    ids: Tensor
    rows: Tensor
    sampled: Tensor


class Logits(NamedTuple):
    """What a model makes of its head's products: ``cap * tanh(scale * (product + bias) / cap)``."""

    scale: float
    cap: float | None
    bias: Tensor | None


def kept_logprobs(
    x: Tensor,
    weight: Tensor,
    sets: KeptSets,
    logits: Logits,
    temperature: float,
    *,
    entropy_slopes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (R,) f32 nats of the softmax at ``temperature`` over each token's set.

    Args:
        x: (R, C) what the head reads at each response token, f32 or bf16. weight: (V, C).
        sets: the set of each token. logits: the model's scale, soft cap and bias. temperature: above 0.

    Returns:
        logprobs, differentiable in x, weight and bias; entropies, detached unless ``entropy_slopes`` are wanted.
    """
    z = _KeptProducts.apply(x, weight, sets.ids, sets.rows)
    if logits.bias is not None:
        z = z + logits.bias.float()[sets.ids]
    z = z * logits.scale
    if logits.cap is not None:
        z = logits.cap * torch.tanh(z / logits.cap)
    z = z / temperature
    count = x.shape[0]
    largest = z.new_full((count,), -torch.inf).scatter_reduce(0, sets.rows, z.detach(), "amax")
    shifted = z - largest[sets.rows]
    total = z.new_zeros(count).index_add(0, sets.rows, shifted.exp()).log()
    logprobs = shifted[sets.sampled] - total
    with torch.set_grad_enabled(entropy_slopes and torch.is_grad_enabled()):
        each = shifted - total[sets.rows]
        # a token barred by a bias of -inf has probability 0, and 0 * inf is not 0, nor is its slope
        possible = each > -torch.inf
        finite = torch.where(possible, each, 0.0)
        terms = torch.where(possible, finite.exp() * finite, 0.0)
        entropies = -z.new_zeros(count).index_add(0, sets.rows, terms)
    return logprobs, entropies


class _KeptProducts(torch.autograd.Function):
    """z[i] = x[rows[i]] . weight[ids[i]] in f32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ids, rows)
        z = x.new_empty(len(ids), dtype=torch.float32)
        if _dense(x, weight, ids):
            whole = weight.float().t()
            for tokens, entries in _blocks_of_tokens(rows, x.shape[0], weight.shape[0]):
                logits = x[tokens].float() @ whole
                z[entries] = logits[rows[entries] - tokens.start, ids[entries]]
        else:
            for part in _blocks(len(ids), x.shape[1]):
                z[part] = (x[rows[part]].float() * weight[ids[part]].float()).sum(-1)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, weight, ids, rows = ctx.saved_tensors
        dx = torch.zeros_like(x, dtype=torch.float32)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        if _dense(x, weight, ids):
            whole = weight.float()
            for tokens, entries in _blocks_of_tokens(rows, x.shape[0], weight.shape[0]):
                dense = dz.new_zeros(tokens.stop - tokens.start, weight.shape[0])
                dense[rows[entries] - tokens.start, ids[entries]] = dz[entries]
                dx[tokens] = dense @ whole
                dweight.addmm_(dense.t(), x[tokens].float())
        else:
            for part in _blocks(len(ids), x.shape[1]):
                dx.index_add_(0, rows[part], dz[part, None] * weight[ids[part]].float())
                dweight.index_add_(0, ids[part], dz[part, None] * x[rows[part]].float())
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


def _dense(x: Tensor, weight: Tensor, ids: Tensor) -> bool:
    return _DENSE * len(ids) >= x.shape[0] * weight.shape[0]


def _blocks(count: int, width: int) -> Iterator[slice]:
    size = max(1, _BLOCK // width)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _blocks_of_tokens(rows: Tensor, count: int, vocab: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of tokens, and of the entries that belong to them."""
    for tokens in _blocks(count, vocab):
        bounds = torch.searchsorted(rows, rows.new_tensor([tokens.start, tokens.stop]))
        yield tokens, slice(int(bounds[0]), int(bounds[1]))
