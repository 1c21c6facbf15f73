"""Pairwise win rates, with intervals, and with the effect of length taken out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptcore.stats.arguments import at_least, numbers, share
from gptcore.stats.distributions import normal_quantile
from gptcore.stats.intervals import Interval, mean, wilson


def win_rate(wins: int, losses: int, ties: int = 0, level: float = 0.95) -> Interval:
    """The share of wins, a tie counting half. Wilson's interval, by the outcomes' own variance where there are ties."""
    for name, count in (("wins", wins), ("losses", losses), ("ties", ties)):
        at_least("win_rate", name, count, 0)
    trials = wins + losses + ties
    at_least("win_rate", "wins + losses + ties", trials, 1)
    if not ties:
        return wilson(wins, trials, level)
    rate = (wins + ties / 2) / trials
    spread = wins * (1 - rate) ** 2 + losses * rate**2 + ties * (0.5 - rate) ** 2
    if not 0 < rate < 1 or not spread:
        return Interval(rate, *wilson(rate * trials, trials, level)[1:])
    # ties vary less than wins and losses do: as many trials as give the binomial that variance
    effective = rate * (1 - rate) * trials * trials / spread
    return Interval(rate, *wilson(rate * effective, effective, level)[1:])


class LengthControlled(NamedTuple):
    """The win rate at equal lengths; the raw one; the log-odds that one standard unit of length brings."""

    rate: Interval
    raw: Interval
    effect: float


def length_controlled(
    outcomes: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    *,
    level: float = 0.95,
    prior: float = 1.0,
) -> LengthControlled:
    """What the win rate would be if both answers were equally long (Dubois et al. 2024, AlpacaEval 2's regression).

    ``logit P(win) = skill + effect tanh(difference of lengths / its standard deviation)``, fitted to the outcomes; the
    rate is ``sigmoid(skill)``, its interval from the robust (sandwich) variance.

    Args:
        outcomes: (N,) in [0, 1]: 1 won, 0 lost, 0.5 tied, or a judge's probability.
        lengths, baseline_lengths: (N,) of the two answers, in any unit.
        prior: strength of the pull of both coefficients towards 0, in pseudo-observations of each; keeps an unbeaten
            model finite.
    """
    share("length_controlled", "level", level)
    at_least("length_controlled", "prior", prior, 0.0)
    y = numbers("length_controlled", "outcomes", outcomes, least=2)
    difference = numbers("length_controlled", "lengths", lengths) - numbers(
        "length_controlled", "baseline_lengths", baseline_lengths
    )
    if y.shape != difference.shape or y.ndim != 1 or y.min() < 0 or y.max() > 1:
        raise ValueError(
            f"length_controlled: outcomes {y.shape} in [0, 1] and lengths {difference.shape} of one length expected"
        )
    deviation = float(difference.std())
    x = np.stack([np.ones_like(y), np.tanh(difference / deviation if deviation else difference * 0)], 1)
    weights, covariance = _logistic(x, y, prior / 4)
    half = normal_quantile(0.5 + level / 2) * math.sqrt(covariance[0, 0])
    bounds = [1 / (1 + math.exp(-t)) for t in (weights[0], weights[0] - half, weights[0] + half)]
    return LengthControlled(Interval(*bounds), mean(y, level), float(weights[1]))


def _logistic(
    x: NDArray[np.float64], y: NDArray[np.float64], ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients of a ridge logistic regression by Newton's method, and their sandwich covariance."""
    weights = np.zeros(x.shape[1])
    penalty = (ridge + 1e-9) * np.eye(x.shape[1])  # a column of zeros, equal lengths, has coefficient 0
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -500, 500)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty
        step = np.linalg.solve(hessian, x.T @ (y - p) - penalty @ weights)
        weights = weights + np.clip(step, -4, 4)
        if np.abs(step).max() < 1e-10:
            break
    p = 1 / (1 + np.exp(-np.clip(x @ weights, -500, 500)))
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + penalty)
    meat = (x * ((y - p) ** 2)[:, None]).T @ x
    return weights, bread @ meat @ bread
