"""Ratings from pairwise battles: Bradley and Terry's model with a prior, its intervals, and Elo's updates.

``P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400))``. A tie counts half a win for each. Everything runs on the matrix of
wins, so a million battles cost no more than their counts.

The prior gives each player ``prior`` battles, half of them won, against a player of average strength who is not in the
table. So the unbeaten, and those who were never compared, have finite ratings.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptcore.errors import UserError
from gptcore.stats.arguments import at_least, numbers, share
from gptcore.stats.distributions import normal_quantile
from gptcore.stats.intervals import Interval

Array = NDArray[np.float64]
SCALE = 400 / math.log(10)  # points a unit of log-odds
ORIGIN = 1000.0  # the mean rating
_BLOCK = 1 << 21  # elements of a block of resamples: a few MiB, which stay in the cache


class Ratings(NamedTuple):
    """ratings (M,) and covariance (M, M), in Elo points; the mean rating is ``ORIGIN``."""

    ratings: Array
    covariance: Array

    def intervals(self, level: float = 0.95) -> list[Interval]:
        """Of each player, by the sandwich covariance, which does not trust the model to be right."""
        share("Ratings.intervals", "level", level)
        half = normal_quantile(0.5 + level / 2) * np.sqrt(np.diag(self.covariance))
        return [
            Interval(float(r), float(r - h), float(r + h)) for r, h in zip(self.ratings, half, strict=True)
        ]

    def difference(self, i: int, j: int, level: float = 0.95) -> Interval:
        """Of player i's rating less player j's: narrower than their own intervals suggest, where they met."""
        share("Ratings.difference", "level", level)
        c = self.covariance
        half = normal_quantile(0.5 + level / 2) * math.sqrt(max(0.0, c[i, i] + c[j, j] - 2 * c[i, j]))
        middle = float(self.ratings[i] - self.ratings[j])
        return Interval(middle, middle - half, middle + half)


class Counts(NamedTuple):
    """wins (M, M): how often row beat column; ties (M, M), each in the place of its first player."""

    wins: Array
    ties: Array


def count(first: ArrayLike, second: ArrayLike, outcomes: ArrayLike, players: int) -> Counts:
    """Battles (N,) to counts: indices of both players, and 1 where the first won, 0 where the second, 0.5 for a tie."""
    a, b, y = np.asarray(first), np.asarray(second), np.asarray(outcomes)
    if not (a.shape == b.shape == y.shape and a.ndim == 1):
        raise ValueError(f"count: first {a.shape}, second {b.shape}, outcomes {y.shape}; expected (N,) each")
    if len(a) and (min(a.min(), b.min()) < 0 or max(a.max(), b.max()) >= players or (a == b).any()):
        raise ValueError(f"count: a battle needs two different players of 0 to {players - 1}")
    if not np.isin(y, (0.0, 0.5, 1.0)).all():
        raise ValueError("count: outcomes must be 1, 0 or 0.5")
    shape = (players, players)
    won, lost, tied = (a * players + b)[y == 1], (b * players + a)[y == 0], (a * players + b)[y == 0.5]
    wins = np.bincount(np.concatenate([won, lost]), minlength=players**2)
    ties = np.bincount(tied, minlength=players**2)
    return Counts(wins.reshape(shape).astype(np.float64), ties.reshape(shape).astype(np.float64))


def fit(wins: ArrayLike, ties: ArrayLike | None = None, *, prior: float = 1.0) -> Ratings:
    """Ratings of greatest likelihood, by Newton's method, with their sandwich covariance.

    Args:
        wins, ties: (M, M) counts, as :func:`count` gives them.
        prior: battles of each player against the average; 0 for none.

    Raises:
        UserError: without a prior, a player or a group that never lost, or never won, against the rest: its rating
            would be infinite.
    """
    won, tied = _checked(wins, ties, prior)
    effective = won + (tied + tied.T) / 2
    if not prior:
        _refuse_infinite(effective)
    theta = _newton(effective, prior, np.zeros(len(won)))
    bread = np.linalg.inv(_information(effective, theta, prior))
    p = _sigmoid(theta[:, None] - theta[None, :])
    squares = won * (1 - p) ** 2 + tied * (0.5 - p) ** 2
    meat = _laplacian(squares + squares.T) + np.diag(prior * 0.25 * np.ones(len(won)))
    centring = np.eye(len(won)) - 1 / len(won)
    covariance = centring @ bread @ meat @ bread @ centring
    return Ratings(ORIGIN + SCALE * (theta - theta.mean()), SCALE**2 * covariance)


def bootstrap(
    wins: ArrayLike,
    ties: ArrayLike | None = None,
    *,
    prior: float = 1.0,
    resamples: int = 1000,
    seed: int = 0,
) -> Array:
    """(R, M) ratings, each from battles weighed anew, by Rubin's Bayesian bootstrap (1981): a battle weighs
    Exponential(1), so a cell of c battles Gamma(c), which costs a third of drawing counts. Needs a
    prior, since a resample can leave anyone next to unbeaten.

    The same for any number of threads: each block of resamples has its own generator.
    """
    at_least("bootstrap", "resamples", resamples, 1)
    if not prior > 0:
        raise ValueError(f"bootstrap: prior is {prior}, expected a positive number")
    won, tied = _checked(wins, ties, prior)
    theta = _newton(won + (tied + tied.T) / 2, prior, np.zeros(len(won)))
    size = max(1, min(resamples, _BLOCK // won.size))
    starts = range(0, resamples, size)
    seeds = np.random.SeedSequence(seed).spawn(len(starts))

    def block(start: int, source: np.random.SeedSequence) -> Array:
        rng = np.random.default_rng(source)
        drawn = _resampled(won, min(size, resamples - start), rng)
        if tied.any():
            halves = _resampled(tied, len(drawn), rng) / 2
            drawn += halves + halves.transpose(0, 2, 1)
        return _refit(drawn, prior, theta)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        parts = list(pool.map(block, starts, seeds))
    found = np.concatenate(parts)
    return np.asarray(ORIGIN + SCALE * (found - found.mean(1, keepdims=True)))


def quantiles(samples: Array, ratings: Array, level: float = 0.95) -> list[Interval]:
    """Intervals of each player from bootstrapped ratings (R, M) and the fitted ones (M,)."""
    share("quantiles", "level", level)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(float(r), float(a), float(b)) for r, a, b in zip(ratings, low, high, strict=True)]


def probability(rating: float, other: float) -> float:
    """That the first of two ratings wins."""
    return 1.0 / (1.0 + math.exp((other - rating) / SCALE))


def elo(first: ArrayLike, second: ArrayLike, outcomes: ArrayLike, players: int, *, k: float = 4.0) -> Array:
    """(M,) ratings after Elo's updates in the battles' order, from ``ORIGIN``: they depend on that order, :func:`fit`'s
    do not. Arguments as in :func:`count`; ``k`` points are at stake in a battle."""
    count(first, second, outcomes, players)
    ratings = [ORIGIN] * players
    battles = (np.asarray(x).tolist() for x in (first, second, outcomes))
    for a, b, y in zip(*battles, strict=True):
        moved = k * (y - probability(ratings[a], ratings[b]))
        ratings[a] += moved
        ratings[b] -= moved
    return np.array(ratings)


# --- the model ----------------------------------------------------------------------------------------------------


def _checked(wins: ArrayLike, ties: ArrayLike | None, prior: float) -> tuple[Array, Array]:
    at_least("bradley_terry", "prior", prior, 0.0)
    won = numbers("bradley_terry", "wins", wins, least=4)
    tied = np.zeros_like(won) if ties is None else numbers("bradley_terry", "ties", ties, least=4)
    if won.ndim != 2 or won.shape[0] != won.shape[1] or tied.shape != won.shape:
        raise ValueError(
            f"bradley_terry: wins {won.shape}, ties {tied.shape}; expected (players, players) both"
        )
    if won.min() < 0 or tied.min() < 0 or np.diag(won).any() or np.diag(tied).any():
        raise ValueError("bradley_terry: counts must be at least 0, and 0 between a player and itself")
    return won, np.triu(tied + tied.T)


def _refuse_infinite(effective: Array) -> None:
    """Finite ratings need a chain of wins from everyone to everyone (Ford 1957)."""
    reach = (effective > 0) | np.eye(len(effective), dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(len(effective))))):
        reach = (reach.astype(np.float64) @ reach) > 0
    if not reach.all():
        i, j = (int(x) for x in np.argwhere(~reach)[0])
        raise UserError(
            f"bradley_terry: player {i} has no chain of wins to player {j}, so their ratings are infinitely far apart; "
            "give a prior"
        )


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _laplacian(weights: Array) -> Array:
    """Sum over pairs of ``weight (e_i - e_j)(e_i - e_j)'``, of symmetric weights (..., M, M)."""
    out = -weights
    index = np.arange(weights.shape[-1])
    out[..., index, index] += weights.sum(-1)
    return out


def _slope(effective: Array, theta: Array, prior: float) -> Array:
    """Gradient of the log-likelihood, (..., M)."""
    p = _sigmoid(theta[..., :, None] - theta[..., None, :])
    p *= effective + np.swapaxes(effective, -1, -2)
    return np.asarray(effective.sum(-1) - p.sum(-1) + prior * (0.5 - _sigmoid(theta)))


def _information(effective: Array, theta: Array, prior: float) -> Array:
    """Minus the second derivative, (..., M, M); without a prior the free constant is fixed by a rank-one term."""
    p = _sigmoid(theta[..., :, None] - theta[..., None, :])
    out = _laplacian((effective + np.swapaxes(effective, -1, -2)) * p * (1 - p))
    index = np.arange(theta.shape[-1])
    own = _sigmoid(theta)
    out[..., index, index] += prior * own * (1 - own)
    return out if prior else out + 1.0 / theta.shape[-1]


def _newton(effective: Array, prior: float, theta: Array) -> Array:
    """The maximum from ``theta`` (..., M), by Newton's method with bounded steps; the likelihood is concave."""
    for _ in range(200):
        slope = _slope(effective, theta, prior)
        step = np.linalg.solve(_information(effective, theta, prior), slope[..., None])[..., 0]
        theta = theta + step / np.maximum(1.0, np.abs(step).max(-1, keepdims=True) / 2)
        if np.abs(step).max() < 1e-8:  # the step after this one would be its square
            return theta
    raise UserError("bradley_terry: the ratings do not converge; give a larger prior")


def _resampled(cells: Array, resamples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(R, M, M) summed weights of each cell's battles; cells without battles stay without."""
    out = np.zeros((resamples, cells.size), dtype=np.float32)
    there = np.flatnonzero(cells)
    shape = cells.ravel()[there].astype(np.float32)
    out[:, there] = rng.standard_gamma(shape, (resamples, len(there)), dtype=np.float32)
    return out.reshape(resamples, *cells.shape)


def _refit(drawn: NDArray[np.float32], prior: float, start: Array) -> Array:
    """(R, M) maxima for resampled weights. The information of the whole data serves for all: it is nearly theirs where
    there are many battles, and each step then gains digits for the price of a gradient. Who has not arrived takes
    Newton's way."""
    inverse = np.linalg.inv(_information(drawn.mean(0, dtype=np.float64), start, prior))
    theta = np.tile(start, (len(drawn), 1))
    both = drawn + drawn.transpose(0, 2, 1)
    won = drawn.sum(-1, dtype=np.float64)
    step = np.full_like(theta, np.inf)
    for _ in range(25):
        odds = theta.astype(np.float32)
        p = odds[:, None, :] - odds[:, :, None]
        np.exp(p, out=p)
        p += 1.0
        np.divide(both, p, out=p)
        slope = won - p.sum(-1)
        # what one player gains another loses: their sum is f32's rounding, and would move all together for ever
        slope -= slope.mean(-1, keepdims=True)
        slope += prior * (0.5 - _sigmoid(theta))
        step = slope @ inverse
        theta += np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-4:  # a fiftieth of an Elo point
            return theta
    late = np.abs(step).max(-1) >= 1e-4
    theta[late] = _newton(drawn[late].astype(np.float64), prior, np.tile(start, (int(late.sum()), 1)))
    return theta
