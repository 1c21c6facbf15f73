"""Whether probabilities mean what they say."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptcore.stats.arguments import at_least, numbers
from gptcore.stats.intervals import Interval, wilson


class Bin(NamedTuple):
    """Forecasts of nearly one probability: their mean, how many, and how often what they said came true."""

    forecast: float
    number: int
    observed: Interval


class Calibration(NamedTuple):
    """Mean squared error (Brier), mean nats of surprise, expected calibration error, and the curve."""

    brier: float
    log_loss: float
    error: float
    bins: tuple[Bin, ...]


def calibration(
    probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 10, level: float = 0.95
) -> Calibration:
    """Of forecasts (N,) in [0, 1] and outcomes (N,) of 0 and 1, in ``bins`` equally wide bins (Guo et al. 2017).

    A reward model's forecasts are ``sigmoid(chosen - rejected)``; give each pair in a random order, or outcomes are
    all 1.
    """
    at_least("calibration", "bins", bins, 1)
    p, y = (
        numbers("calibration", "probabilities", probabilities),
        numbers("calibration", "outcomes", outcomes),
    )
    if p.shape != y.shape or p.ndim != 1 or p.min() < 0 or p.max() > 1 or not np.isin(y, (0.0, 1.0)).all():
        raise ValueError(
            f"calibration: probabilities {p.shape} in [0, 1] and outcomes {y.shape} of 0 and 1 expected"
        )
    place = np.minimum((p * bins).astype(int), bins - 1)
    filled = tuple(_bin(p[place == i], y[place == i], level) for i in range(bins) if (place == i).any())
    error = sum(b.number * abs(b.forecast - b.observed.estimate) for b in filled) / len(p)
    said = np.where(y == 1, p, 1 - p)
    log_loss = float(-np.log(np.maximum(said, 1e-300)).mean())
    return Calibration(float(((p - y) ** 2).mean()), log_loss, error, filled)


def _bin(p: NDArray[np.float64], y: NDArray[np.float64], level: float) -> Bin:
    return Bin(float(p.mean()), len(p), wilson(float(y.sum()), len(y), level))
