"""How well a score tells two classes apart: the area under the ROC curve."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptcore.stats.arguments import numbers, share
from gptcore.stats.distributions import normal_quantile
from gptcore.stats.intervals import Interval


def auc(scores: ArrayLike, labels: ArrayLike, level: float = 0.95) -> Interval:
    """The chance that a positive scores above a negative, ties counting half; its interval by DeLong et al. 1988.

    Args:
        scores: (N,). labels: (N,) of 0 and 1, both there.
    """
    share("auc", "level", level)
    x, y = numbers("auc", "scores", scores), numbers("auc", "labels", labels)
    if x.shape != y.shape or x.ndim != 1 or not np.isin(y, (0.0, 1.0)).all():
        raise ValueError(f"auc: scores {x.shape} and labels {y.shape}; expected (N,) and labels of 0 and 1")
    positive, negative = x[y == 1], x[y == 0]
    if not len(positive) or not len(negative):
        raise ValueError(
            f"auc: {len(positive)} positives and {len(negative)} negatives, expected some of both"
        )
    everyone = _ranks(x)
    # of each positive the share of negatives below it, and the other way round
    above = (everyone[y == 1] - _ranks(positive)) / len(negative)
    below = 1 - (everyone[y == 0] - _ranks(negative)) / len(positive)
    area = float(above.mean())
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (above, below) if len(part) > 1)
    half = normal_quantile(0.5 + level / 2) * variance**0.5
    return Interval(area, max(0.0, area - half), min(1.0, area + half))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equals sharing their mean."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[group])
