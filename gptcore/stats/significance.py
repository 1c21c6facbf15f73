"""Tests of paired results: the same prompts or seeds under two models. All p-values are two-sided."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from gptcore.stats.arguments import at_least, numbers, paired
from gptcore.stats.distributions import binomial_two_sided, student_two_sided


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Whether two models are right equally often on the same prompts, exactly: only prompts where one is right and the
    other wrong tell (McNemar 1947, by the binomial instead of chi squared).

    Args:
        a, b: (N,) of 0 and 1, or booleans.
    """
    first, second = paired("mcnemar", a, b)
    for name, x in (("a", first), ("b", second)):
        if not np.isin(x, (0.0, 1.0)).all():
            raise ValueError(f"mcnemar: {name} must be 0 or 1 everywhere, right or wrong")
    return mcnemar_counts(
        int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    )


def mcnemar_counts(only_a: int, only_b: int) -> float:
    """The same from how many prompts only the first, and only the second model got right."""
    at_least("mcnemar_counts", "only_a", only_a, 0)
    at_least("mcnemar_counts", "only_b", only_b, 0)
    return binomial_two_sided(only_a, only_a + only_b)


def sign(a: ArrayLike, b: ArrayLike) -> float:
    """Whether either of two is larger more often, exactly; equal pairs do not count."""
    first, second = paired("sign", a, b)
    return binomial_two_sided(int((first > second).sum()), int((first != second).sum()))


def paired_t(a: ArrayLike, b: ArrayLike) -> float:
    """Whether ``a - b`` has mean 0, by Student's distribution; 1 where all differences are 0."""
    first, second = paired("paired_t", a, b, least=2)
    d = first - second
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    if error == 0.0:
        return 1.0 if d[0] == 0 else 0.0
    return student_two_sided(float(d.mean()) / error, len(d) - 1)


def permutation(a: ArrayLike, b: ArrayLike, *, resamples: int = 100_000, seed: int = 0) -> float:
    """Whether ``a - b`` has mean 0, by exchanging the two of each pair: all 2^N ways where those are no more than
    ``resamples`` (8 seeds have 256), else so many at random, the observed one among them."""
    at_least("permutation", "resamples", resamples, 100)
    first, second = paired("permutation", a, b)
    d = first - second
    d = d[d != 0]
    if not len(d):
        return 1.0
    observed = abs(d.sum()) * (1 - 1e-12)  # so that rounding does not tell equal sums apart
    if 2 ** len(d) <= resamples:
        sums = np.zeros(1)
        for x in d:
            sums = np.concatenate([sums + x, sums - x])
        return float((np.abs(sums) >= observed).mean())
    rng, block, extreme = np.random.default_rng(seed), max(1, (1 << 22) // len(d)), 0
    for start in range(0, resamples, block):
        signs = rng.integers(0, 2, (min(block, resamples - start), len(d)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ d) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: ArrayLike) -> list[float]:
    """P-values of several tests, adjusted so that one false alarm among all is as rare as each says (Holm 1979)."""
    p = numbers("holm", "p_values", p_values)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.minimum(adjusted, 1.0)
    return [float(x) for x in result]
