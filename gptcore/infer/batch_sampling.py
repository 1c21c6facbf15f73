"""One token for each of many rows of logits, with its log-probability under the distribution sampled from.

Row by row the tokens are those of :func:`gptcore.infer.sampling.sample`; here the arithmetic, float64 in the same
order, is over a block of rows at a time, since for a small vocabulary a call per row costs more than the row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptcore import ops
from gptcore.errors import UserError
from gptcore.infer.sampling import SamplingParams, top_p

Rows = NDArray[np.float64]  # (N, V)

_BLOCK = 1 << 17  # entries of a block: its few float64 arrays stay in the cache, 1 MB each
_HEAD = 1024  # likeliest tokens that are sorted first, as in ``sampling``


class Sampled(NamedTuple):
    """``tokens`` (N,) int64; ``logprobs`` and ``entropies`` (N,) float64 nats, of the distribution sampled from.

    Where it was truncated, ``kept_ids`` int32 are the tokens it had left, rising in each row and end to end, and
    ``kept_counts`` (N,) int64 how many of them are each row's; both None where every token was possible.
    """

    tokens: NDArray[np.int64]
    logprobs: Rows
    entropies: Rows
    kept_ids: NDArray[np.int32] | None
    kept_counts: NDArray[np.int64] | None


def uniforms(seed: int, sequences: NDArray[Any], positions: NDArray[Any]) -> Rows:
    """(N,) numbers in [0, 1): :func:`gptcore.infer.sampling.uniform` of each (sequence, position)."""
    places = np.stack([positions, sequences], axis=1).astype(np.uint64)
    words = ops.philox(np.ascontiguousarray(places).view(np.uint32).view(np.int32), seed).view(np.uint32)
    high, low = words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
    return ((high >> np.uint64(5)) * np.uint64(67108864) + (low >> np.uint64(6))).astype(
        np.float64
    ) * 2.0**-53


def sample_rows(
    logits: NDArray[np.float32], params: SamplingParams, sequences: NDArray[Any], positions: NDArray[Any]
) -> Sampled:
    """The token at ``positions[i]`` of sequence number ``sequences[i]`` for each row i of ``logits`` (N, V).

    Truncation (``top_k``, ``top_p``) says which tokens each row kept; temperature 0 keeps one, with log-probability 0.
    Raises UserError for NaN, +inf, or a row with nothing allowed.
    """
    size = max(1, _BLOCK // logits.shape[1])
    numbers = uniforms(params.seed, sequences, positions)
    blocks = [
        _block(logits[first : first + size], params, numbers[first : first + size])
        for first in range(0, len(logits), size)
    ]
    if len(blocks) == 1:
        return blocks[0]
    joined = [None if part[0] is None else np.concatenate(part) for part in zip(*blocks, strict=True)]
    return Sampled(*joined)  # type: ignore[arg-type]


def _block(logits: NDArray[np.float32], params: SamplingParams, numbers: Rows) -> Sampled:
    """A ``sample_rows`` of few rows."""
    largest = logits.max(axis=1, initial=-np.inf)
    if not np.isfinite(largest).all():
        raise UserError("the model's logits are not finite; its weights are damaged or its training diverged")
    if params.temperature == 0.0:
        return _greedy(logits)
    scaled = (logits.astype(np.float64) - largest[:, None]) / params.temperature
    truncated = 0 < params.top_k < logits.shape[1] or params.top_p < 1.0
    if 0 < params.top_k < logits.shape[1]:
        scaled[~_largest(scaled, params.top_k)] = -np.inf
    weights = np.exp(scaled)
    if params.top_p < 1.0:
        weights = _nucleus(weights, params.top_p)
    totals = weights.sum(axis=1)
    probs = weights / totals[:, None]
    tokens = _draw(probs, numbers)
    rows = np.arange(len(tokens))
    log_totals = np.log(totals)
    # where a weight is 0 its exponent may be -inf, whose product would be NaN
    entropies = log_totals - np.einsum("nv,nv->n", probs, np.where(weights > 0, scaled, 0.0))
    ids = counts = None
    if truncated:
        kept = weights > 0
        kept[rows, tokens] = True
        ids, counts = np.nonzero(kept)[1].astype(np.int32), kept.sum(axis=1)
    return Sampled(tokens, scaled[rows, tokens] - log_totals, entropies, ids, counts)


def _greedy(logits: NDArray[np.float32]) -> Sampled:
    tokens = logits.argmax(axis=1)
    nothing = np.zeros(len(tokens))
    return Sampled(tokens, nothing, nothing, tokens.astype(np.int32), np.ones(len(tokens), np.int64))


def _largest(scaled: Rows, k: int) -> NDArray[np.bool_]:
    """(N, V): the k largest of each row; of equal ones the lower token id."""
    vocab = scaled.shape[1]
    threshold = np.partition(scaled, vocab - k, axis=1)[:, vocab - k, None]
    keep = scaled > threshold
    ties = scaled == threshold
    room = k - keep.sum(axis=1, keepdims=True)
    keep |= ties & (np.cumsum(ties, axis=1) <= room)
    return keep


def _nucleus(weights: Rows, p: float) -> Rows:
    """Each row's smallest set of most likely tokens whose sum reaches ``p`` of the row's; others become 0."""
    goal = p * weights.sum(axis=1)
    if weights.shape[1] <= _HEAD:
        order = np.argsort(-weights, axis=1, kind="stable")
        enough = np.ones(len(weights), bool)
    else:
        order, enough = _head(weights, goal)
    running = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    counts = (running < goal[:, None]).sum(axis=1) + 1
    kept = np.zeros_like(weights)
    chosen = np.where(np.arange(order.shape[1]) < counts[:, None], order, order[:, :1])
    np.put_along_axis(kept, chosen, np.take_along_axis(weights, chosen, axis=1), axis=1)
    for row in np.flatnonzero(~enough):
        kept[row] = top_p(weights[row], p)
    return kept


def _head(weights: Rows, goal: Rows) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """(N, 1024) ids by falling weight, and the rows they are enough for: flat or tied ones are not among them."""
    threshold = np.partition(weights, -_HEAD, axis=1)[:, -_HEAD, None]
    likely = weights >= threshold
    enough = (likely.sum(axis=1) == _HEAD) & (np.where(likely, weights, 0.0).sum(axis=1) > goal)
    order = np.tile(np.arange(_HEAD, dtype=np.intp), (len(weights), 1))
    ids = np.nonzero(likely[enough])[1].reshape(-1, _HEAD)
    by_weight = np.argsort(-np.take_along_axis(weights[enough], ids, axis=1), axis=1, kind="stable")
    order[enough] = np.take_along_axis(ids, by_weight, axis=1)
    return order, enough


def _draw(probs: Rows, numbers: Rows) -> NDArray[np.int64]:
    """``sampling.draw`` of each row."""
    cumulative = np.cumsum(probs, axis=1)
    tokens = (cumulative <= (numbers * cumulative[:, -1])[:, None]).sum(axis=1)
    last = probs.shape[1] - 1 - (probs[:, ::-1] > 0).argmax(axis=1)
    return np.minimum(tokens, last)
