"""``batch_sampling.sample_rows`` where the logits are: of each row only its token and what is told of it are copied.

The arithmetic is float64 in the same steps. A device adds up prefix sums in an order of its own, so a token differs
from the processor's only where a random number falls within some 1e-15 of the border between two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcore.errors import UserError
from gptcore.infer.batch_sampling import Sampled, uniforms
from gptcore.infer.sampling import SamplingParams

# Rows at a time: of 50,257 tokens each of a handful of float64 arrays is then 50 MB.
_ROWS = 128


def sample_rows(
    logits: Tensor, params: SamplingParams, sequences: NDArray[Any], positions: NDArray[Any]
) -> Sampled:
    """As :func:`gptcore.infer.batch_sampling.sample_rows`, for ``logits`` (N, V) of any floating dtype and device."""
    numbers = torch.from_numpy(uniforms(params.seed, sequences, positions)).to(logits.device)
    blocks = [
        _block(logits[first : first + _ROWS].double(), params, numbers[first : first + _ROWS])
        for first in range(0, len(logits), _ROWS)
    ]
    *told, finite = (torch.cat(part) for part in zip(*(block[:4] for block in blocks), strict=True))
    tokens, logprobs, entropies = (t.cpu().numpy() for t in told)
    if not bool(finite.all()):
        raise UserError("the model's logits are not finite; its weights are damaged or its training diverged")
    if params.temperature == 0.0:
        return Sampled(tokens, logprobs, entropies, tokens.astype(np.int32), np.ones(len(tokens), np.int64))
    if not _truncates(params, logits.shape[1]):
        return Sampled(tokens, logprobs, entropies, None, None)
    kept = torch.cat([block[4] for block in blocks])
    ids = kept.nonzero()[:, 1].to(torch.int32)
    return Sampled(tokens, logprobs, entropies, ids.cpu().numpy(), kept.sum(1).cpu().numpy())


def _truncates(params: SamplingParams, vocab: int) -> bool:
    return 0 < params.top_k < vocab or params.top_p < 1.0


def _block(logits: Tensor, params: SamplingParams, numbers: Tensor) -> tuple[Tensor, ...]:
    """Tokens, their log-probabilities, entropies, whether each row is finite, and which tokens were left."""
    largest = logits.amax(1)
    finite = largest.isfinite()  # of NaN the maximum is NaN
    if params.temperature == 0.0:
        tokens = logits.argmax(1)
        nothing = torch.zeros_like(largest)
        return tokens, nothing, nothing, finite, finite
    scaled = (logits - largest[:, None]) / params.temperature
    if 0 < params.top_k < logits.shape[1]:
        scaled = scaled.masked_fill(~_largest(scaled, params.top_k), -torch.inf)
    weights = scaled.exp()
    if params.top_p < 1.0:
        weights = _nucleus(weights, params.top_p)
    totals = weights.sum(1)
    probs = weights / totals[:, None]
    tokens = _draw(probs, numbers)
    log_totals = totals.log()
    # where a weight is 0 its exponent may be -inf, whose product would be NaN
    entropies = log_totals - (probs * torch.where(weights > 0, scaled, 0.0)).sum(1)
    logprobs = scaled.gather(1, tokens[:, None])[:, 0] - log_totals
    return tokens, logprobs, entropies, finite, (weights > 0).scatter_(1, tokens[:, None], True)


def _largest(scaled: Tensor, k: int) -> Tensor:
    """(N, V): the k largest of each row; of equal ones the lower token id."""
    threshold = scaled.topk(k, dim=1).values[:, -1:]
    keep, ties = scaled > threshold, scaled == threshold
    room = k - keep.sum(1, keepdim=True)
    return keep | (ties & (ties.cumsum(1) <= room))


def _nucleus(weights: Tensor, p: float) -> Tensor:
    """Each row's smallest set of most likely tokens whose sum reaches ``p`` of the row's; others become 0."""
    falling, order = weights.sort(dim=1, descending=True, stable=True)
    goal = p * weights.sum(1, keepdim=True)
    counts = (falling.cumsum(1) < goal).sum(1, keepdim=True) + 1
    place = torch.arange(weights.shape[1], device=weights.device)
    return torch.zeros_like(weights).scatter_(1, order, torch.where(place < counts, falling, 0.0))


def _draw(probs: Tensor, numbers: Tensor) -> Tensor:
    """The token in whose slice of the cumulative probability, in order of id, each number lies."""
    cumulative = probs.cumsum(1)
    tokens = (cumulative <= numbers[:, None] * cumulative[:, -1:]).sum(1)
    places = torch.arange(probs.shape[1], device=probs.device)
    last = torch.where(probs > 0, places, 0).amax(1)
    return tokens.minimum(last)
