"""pass@k: the chance that at least one of k samples is right."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from gptcore.stats.arguments import numbers
from gptcore.stats.intervals import Interval, bootstrap, mean


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased, from n samples of one problem with c right: ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, eq. 1),
    as a product so that nothing overflows.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n = {n}, c = {c}, k = {k}; expected 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return -math.expm1(sum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def over_problems(n: ArrayLike, c: ArrayLike, k: int, *, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean pass@k over problems, with the interval for other problems of the kind: problems are resampled.

    Args:
        n: (P,) samples of each problem, or one number for all. c: (P,) how many were right.
    """
    right = numbers("over_problems", "c", c, least=2)
    samples = np.broadcast_to(numbers("over_problems", "n", n), right.shape)
    each = [pass_at_k(int(a), int(b), k) for a, b in zip(samples, right, strict=True)]
    return bootstrap(each, level=level, seed=seed) if len(set(each)) > 1 else mean(each, level)
