"""The distributions that intervals and tests need, from the standard library and one continued fraction."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import NormalDist

from gptcore.stats.arguments import share

_NORMAL = NormalDist()


def normal_quantile(p: float) -> float:
    """z with P(Z <= z) = p of the standard normal."""
    share("normal_quantile", "p", p)
    return _NORMAL.inv_cdf(p)


def normal_two_sided(z: float) -> float:
    """P(|Z| >= |z|), with all its digits far out."""
    return math.erfc(abs(z) / math.sqrt(2.0))


def beta_cdf(x: float, a: float, b: float) -> float:
    """P(X <= x) of the beta distribution: the regularised incomplete beta function, by Lentz's continued fraction (DLMF
    8.17.22), to about 1e-14."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_cdf(1.0 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    d = 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    c, fraction = 1.0, d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * fraction / a


def beta_quantile(p: float, a: float, b: float) -> float:
    """x with P(X <= x) = p of the beta distribution."""
    return _invert(lambda x: beta_cdf(x, a, b), p, 0.0, 1.0)


def student_two_sided(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's distribution with ``freedom`` degrees of freedom."""
    if math.isinf(t):
        return 0.0
    return beta_cdf(freedom / (freedom + t * t), freedom / 2, 0.5)


@functools.lru_cache(maxsize=256)  # an interval asks for the same one again and again
def student_quantile(p: float, freedom: float) -> float:
    """t with P(T <= t) = p."""
    share("student_quantile", "p", p)
    if p < 0.5:
        return -student_quantile(1 - p, freedom)
    high = 1.0
    while student_two_sided(high, freedom) > 2 * (1 - p):
        high *= 2
    return _invert(lambda t: 1 - student_two_sided(t, freedom) / 2, p, 0.0, high)


def binomial_two_sided(successes: int, trials: int) -> float:
    """Exact two-sided p-value of a fair coin: twice the smaller tail, at most 1."""
    if not trials:
        return 1.0
    few = min(successes, trials - successes)
    tail = sum(math.comb(trials, i) for i in range(few + 1))
    return min(1.0, float(2 * tail / (1 << trials)) if trials < 1000 else 2 * _large_tail(few, trials))


def _large_tail(few: int, trials: int) -> float:
    return beta_cdf(0.5, trials - few, few + 1)


def _invert(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The place between low and high where a rising function reaches the target, to the last bits."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return 0.5 * (low + high)
