"""Intervals of confidence: shares, means, paired differences, and any statistic by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptcore.stats.arguments import at_least, numbers, paired, share
from gptcore.stats.distributions import beta_quantile, normal_quantile, student_quantile

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Interval(NamedTuple):
    """An estimate and the bounds of its interval of confidence."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def percent(self, sign: str = "") -> str:
        """A share in percent, with ``sign`` behind the estimate."""
        return f"{100 * self.estimate:.1f}{sign} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: float, trials: float, level: float = 0.95) -> Interval:
    """Of a share, by inverting the score test (Wilson 1927): inside [0, 1], and never empty at 0 or all successes."""
    _check_share("wilson", successes, trials, level)
    z = normal_quantile(0.5 + level / 2)
    p = successes / trials
    scale = 1 + z * z / trials
    middle = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else middle - half
    return Interval(p, low, 1.0 if successes == trials else middle + half)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Of a share, from the binomial's own tails (Clopper and Pearson 1934): covers at least ``level``, and is wider."""
    _check_share("clopper_pearson", successes, trials, level)
    tail = (1 - level) / 2
    low = beta_quantile(tail, successes, trials - successes + 1) if successes else 0.0
    high = beta_quantile(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return Interval(successes / trials, low, high)


def mean(values: ArrayLike, level: float = 0.95) -> Interval:
    """Of a mean, by Student's distribution; at least 2 values."""
    share("mean", "level", level)
    x = numbers("mean", "values", values, least=2).ravel()
    half = student_quantile(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    middle = float(x.mean())
    return Interval(middle, middle - half, middle + half)


def difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Of the mean of ``a - b``, pair by pair: the same prompts or seeds, so what they share cancels."""
    first, second = paired("difference", a, b, least=2)
    return mean(first - second, level)


def bootstrap(
    values: ArrayLike,
    statistic: Statistic | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Of any statistic, bias-corrected and accelerated (Efron 1987).

    Args:
        values: (N,), or (N, D) whose rows are resampled together.
        statistic: (R, N) or (R, N, D) to (R,); None: the mean. Called on blocks of resamples.
    """
    share("bootstrap", "level", level)
    at_least("bootstrap", "resamples", resamples, 100)
    x = numbers("bootstrap", "values", values, least=2)
    of = statistic if statistic is not None else (lambda block: np.asarray(block.mean(1)))
    n, rng = len(x), np.random.default_rng(seed)
    block = max(1, (1 << 22) // x.size)
    drawn = np.concatenate(
        [of(x[rng.integers(0, n, (min(block, resamples - i), n))]) for i in range(0, resamples, block)]
    )
    estimate = float(of(x[None])[0])
    low, high = (1 - level) / 2, (1 + level) / 2
    bounds = np.quantile(drawn, _accelerated(drawn, estimate, _left_out(x, of), low, high))
    return Interval(estimate, float(bounds[0]), float(bounds[1]))


def _left_out(x: NDArray[np.float64], of: Statistic) -> NDArray[np.float64]:
    """The statistic without each row in turn; of at most 1,000 rows, which is enough for a skewness."""
    rows = range(len(x)) if len(x) <= 1000 else np.linspace(0, len(x) - 1, 1000).astype(int)
    return np.array([float(of(np.delete(x, i, axis=0)[None])[0]) for i in rows])


def _accelerated(
    drawn: NDArray[np.float64], estimate: float, without: NDArray[np.float64], low: float, high: float
) -> list[float]:
    """The quantiles of the resamples to take, moved by median bias and by skewness."""
    below = ((drawn < estimate).sum() + 0.5 * (drawn == estimate).sum()) / len(drawn)
    if not 0 < below < 1:
        return [low, high]
    bias = normal_quantile(float(below))
    away = without.mean() - without
    spread = float((away**2).sum()) ** 1.5
    acceleration = float((away**3).sum()) / (6 * spread) if spread > 0 else 0.0
    moved = []
    for p in (low, high):
        z = bias + normal_quantile(p)
        moved.append(0.5 * math.erfc(-(bias + z / (1 - acceleration * z)) / math.sqrt(2)))
    return moved


def _check_share(function: str, successes: float, trials: float, level: float) -> None:
    share(function, "level", level)
    at_least(function, "trials", trials, 1)
    if not 0 <= successes <= trials:
        raise ValueError(f"{function}: successes is {successes}, expected one from 0 to {trials}")
