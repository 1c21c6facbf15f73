"""What a handful of noisy pairs says of a true value."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

GAUSS_95 = 1.645  # one-sided


def median_and_bound(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the order statistic that lies above the true one in 95 of 100 cases.

    Of five values or more; of fewer none is as sure.
    """
    place = math.ceil(len(values) / 2 + GAUSS_95 * math.sqrt(len(values)) / 2)
    return statistics.median(values), sorted(values)[min(place, len(values) - 1)]
