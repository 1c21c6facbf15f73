"""Best-of-n: the distribution that taking the best of n samples makes, its divergence, and its expected score."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptcore.stats.arguments import at_least, numbers


def distribution(probabilities: ArrayLike, scores: ArrayLike, n: int) -> NDArray[np.float64]:
    """(V,): the probability that each of V answers is the best of n independent samples, ``F(y)^n - F(y-)^n``.

    F is the cumulative distribution of the score. Answers of equal score share theirs in proportion to their own
    probability.

    Args:
        probabilities: (V,), of the policy that is sampled. scores: (V,). n: at least 1.
    """
    at_least("best_of_n.distribution", "n", n, 1)
    p = numbers("best_of_n.distribution", "probabilities", probabilities)
    s = numbers("best_of_n.distribution", "scores", scores)
    if p.shape != s.shape or p.min() < 0 or not math.isclose(p.sum(), 1.0, abs_tol=1e-9):
        raise ValueError(
            f"best_of_n.distribution: probabilities of {p.shape} must sum to 1 and be one for each score of {s.shape}"
        )
    levels, level = np.unique(s, return_inverse=True)
    mass = np.bincount(level, weights=p, minlength=len(levels))
    up_to = np.cumsum(mass)
    won = up_to**n - (up_to - mass) ** n
    share = np.divide(p, mass[level], out=np.zeros_like(p), where=mass[level] > 0)
    return np.asarray(won[level] * share)


def kl_bound(n: int) -> float:
    """``log n - (n - 1) / n`` nats: an upper bound of KL(best of n || policy), reached where no two scores are equal
    and every answer is improbable (Beirami et al. 2024, theorem 1)."""
    at_least("best_of_n.kl_bound", "n", n, 1)
    return math.log(n) - (n - 1) / n


def expected_best(scores: ArrayLike, n: int, *, by: ArrayLike | None = None) -> float:
    """An unbiased estimate, from N samples of one prompt, of the score of the best of n (n at most N).

    The mean over all subsets of n, in closed form: the i-th lowest of N is the best of C(i - 1, n - 1) of them.

    Args:
        scores: (N,), what is averaged: the gold score, say.
        by: (N,), what chooses: the proxy's score. None: ``scores``. Of equals the later one is taken.
    """
    values = numbers("best_of_n.expected_best", "scores", scores)
    chooser = values if by is None else numbers("best_of_n.expected_best", "by", by)
    if values.ndim != 1 or values.shape != chooser.shape or not 1 <= n <= len(values):
        raise ValueError(
            f"best_of_n.expected_best: scores {values.shape}, by {chooser.shape} and n = {n}; "
            "expected (N,) and 1 <= n <= N"
        )
    total = math.comb(len(values), n)
    weights = [math.comb(i, n - 1) / total for i in range(len(values))]
    return float(values[np.argsort(chooser, kind="stable")] @ np.array(weights))
