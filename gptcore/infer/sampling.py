"""From logits to a token: temperature, top-k, top-p, and a random number that belongs to the position.

The uniform number that picks token ``position`` of sequence ``sequence`` is Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) of (seed, sequence, position) and of nothing else:
no generator is advanced. So a sequence gets the same tokens alone or in a batch, streamed or not, and
after its cache was forked or truncated.

The arithmetic is float64 NumPy on one row of V logits at a time, in an order fixed by V. A row of 50,257
logits costs well under a millisecond, small beside the forward pass that made it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptcore import ops
from gptcore.errors import UserError

Row = NDArray[np.float64]  # (V,) logits, or probabilities, of one sequence

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    temperature: 0 takes the most likely token; 1 samples the model's own distribution. Default 0.8.
    top_k: keep the k most likely tokens; 0 keeps all (default).
    top_p: keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all. Default 0.95.
    seed: any integer from 0 to 2**64 - 1. Default 0.

    Temperature is applied first, then top-k, then top-p (on what top-k kept, renormalised).
    Raises UserError for a value outside its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < float("inf")):
            raise UserError(f"temperature is {self.temperature}, expected 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, expected 0 (keep all) or a positive number of tokens")
        if not (0.0 < self.top_p <= 1.0):
            raise UserError(f"top_p is {self.top_p}, expected a probability above 0 and at most 1")
        if not (0 <= self.seed < 2**64):
            raise UserError(f"seed is {self.seed}, expected an integer from 0 to 2**64 - 1")


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words, a function of a 128-bit counter and a 64-bit key (10 rounds)."""
    words = ops.philox(np.array([counter], dtype=np.uint32).view(np.int32), key[0] | key[1] << 32)
    first, second, third, fourth = words.view(np.uint32)[0].tolist()
    return first, second, third, fourth


def uniform(seed: int, sequence: int, position: int) -> float:
    """The number in [0, 1) that belongs to (seed, sequence, position); 53 random bits."""
    counter = (position & _MASK, position >> 32, sequence & _MASK, sequence >> 32)
    high, low, _, _ = philox4x32(counter, (seed & _MASK, seed >> 32))
    return ((high >> 5) * 67108864 + (low >> 6)) * 2.0**-53


def top_k(logits: Row, k: int) -> Row:
    """Keep the k largest logits and set the others to -inf; of equal logits the lower token id wins."""
    vocab = logits.shape[0]
    if k == 0 or k >= vocab:
        return logits
    threshold = np.partition(logits, vocab - k)[vocab - k]
    keep = logits > threshold
    ties = np.flatnonzero(logits == threshold)
    keep[ties[: k - int(keep.sum())]] = True
    return np.where(keep, logits, -np.inf)


def top_p(probs: Row, p: float) -> Row:
    """Keep the smallest set of most likely tokens whose sum reaches ``p``; others become 0, unnormalised.

    Of equal probabilities the lower token id comes first. At least one token is always kept.
    """
    if p >= 1.0:
        return probs
    order = _most_likely(probs, p)
    count = int(np.searchsorted(np.cumsum(probs[order]), p * probs.sum())) + 1
    kept = np.zeros_like(probs)
    kept[order[:count]] = probs[order[:count]]
    return kept


def _most_likely(probs: Row, p: float, head: int = 1024) -> NDArray[np.intp]:
    """Token ids by falling probability, at least as many as it takes to reach ``p`` of the sum.

    Sorting all of a 50k vocabulary costs 4 ms; the ``head`` likeliest tokens nearly always hold enough.
    """
    if probs.shape[0] > head:
        threshold = np.partition(probs, -head)[-head]
        ids = np.flatnonzero(probs >= threshold)
        if probs[ids].sum() > p * probs.sum():
            return ids[np.argsort(-probs[ids], kind="stable")]
    return np.argsort(-probs, kind="stable")


def probabilities(logits: Row, params: SamplingParams) -> Row:
    """(V,) probabilities after temperature, top-k and top-p; temperature 0 gives 1 to the most likely token.

    A logit of -inf forbids its token. Raises UserError for NaN, +inf, or a row with nothing allowed.
    """
    logits = np.asarray(logits, dtype=np.float64)
    largest = logits.max(initial=-np.inf)
    if not np.isfinite(largest):
        raise UserError("the model's logits are not finite; its weights are damaged or its training diverged")
    if params.temperature == 0.0:
        probs = np.zeros_like(logits)
        probs[logits.argmax()] = 1.0
        return probs
    # subtracting the maximum first keeps a tiny temperature from overflowing
    scaled = top_k((logits - largest) / params.temperature, params.top_k)
    probs = top_p(np.exp(scaled), params.top_p)
    return probs / probs.sum()


def draw(probs: Row, number: float) -> int:
    """The token whose slice of the cumulative probability, in order of id, contains ``number`` in [0, 1)."""
    cumulative = np.cumsum(probs)
    token = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    # rounding can put the product on the last step itself; the last possible token is then meant
    return min(token, int(np.flatnonzero(probs)[-1]))


def sample(logits: Row, params: SamplingParams, sequence: int, position: int) -> int:
    """The token at ``position`` (0 for the first one generated) of sequence number ``sequence``."""
    probs = probabilities(logits, params)
    if params.temperature == 0.0:
        return int(probs.argmax())
    return draw(probs, uniform(params.seed, sequence, position))
