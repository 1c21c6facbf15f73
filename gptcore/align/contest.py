"""Assistants compared by what a judge says of their answers to the same prompts: win rates and ratings, with intervals.

contest = Contest(("sft", "ppo"), scores, lengths)
contest.rate(1, 0), contest.ratings()
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptcore.errors import UserError
from gptcore.stats import bradley_terry
from gptcore.stats.intervals import Interval
from gptcore.stats.win_rate import LengthControlled, length_controlled, win_rate


class Rate(NamedTuple):
    """How often one assistant beats another, a tie counting half: as it is, and at equal lengths."""

    raw: Interval
    controlled: LengthControlled


class Rating(NamedTuple):
    """Points of Bradley and Terry's model, 1000 on average: with the sandwich's interval, and the bootstrap's."""

    name: str
    rating: Interval
    bootstrapped: Interval


@dataclass(frozen=True)
class Contest:
    """Of M assistants over P prompts: ``names`` (M), a judge's ``scores`` (M, P), ``lengths`` (M, P) of the answers.

    Of two answers to a prompt the one with the higher score wins; equal scores are a tie.

    Raises:
        UserError: fewer than 2 assistants or prompts, a name twice, shapes that differ, scores that are not finite.
    """

    names: tuple[str, ...]
    scores: NDArray[np.float64]
    lengths: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = (len(self.names), self.scores.shape[-1])
        if self.scores.shape != shape or self.lengths.shape != shape:
            raise UserError(
                f"contest: scores {self.scores.shape} and lengths {self.lengths.shape} of {len(self.names)} "
                "assistants, expected (assistants, prompts) both"
            )
        if min(shape) < 2:
            raise UserError(
                f"contest: {shape[0]} assistants and {shape[1]} prompts, expected at least 2 of each"
            )
        if len(set(self.names)) < len(self.names):
            raise UserError(f"contest: an assistant is there twice: {', '.join(self.names)}")
        if not np.isfinite(self.scores).all():
            bad = int(np.argwhere(~np.isfinite(self.scores))[0][0])
            raise UserError(f"contest: the judge gives {self.names[bad]} a score that is not finite")

    def outcomes(self, first: int, second: int) -> NDArray[np.float64]:
        """(P,) 1 where assistant ``first`` wins, 0 where ``second`` does, 0.5 for ties."""
        return 0.5 + 0.5 * np.sign(self.scores[first] - self.scores[second])

    def rate(self, first: int, second: int, level: float = 0.95) -> Rate:
        """How often assistant ``first`` beats ``second``."""
        outcomes = self.outcomes(first, second)
        wins, losses = int((outcomes == 1).sum()), int((outcomes == 0).sum())
        raw = win_rate(wins, losses, len(outcomes) - wins - losses, level)
        controlled = length_controlled(outcomes, self.lengths[first], self.lengths[second], level=level)
        return Rate(raw, controlled)

    def ratings(self, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> list[Rating]:
        """All pairs' battles as ratings, the best assistant first."""
        pairs = list(itertools.combinations(range(len(self.names)), 2))
        prompts = self.scores.shape[1]
        first, second = (np.repeat([pair[side] for pair in pairs], prompts) for side in (0, 1))
        outcomes = np.concatenate([self.outcomes(*pair) for pair in pairs])
        counts = bradley_terry.count(first, second, outcomes, len(self.names))
        fitted = bradley_terry.fit(*counts)
        drawn = bradley_terry.bootstrap(*counts, resamples=resamples, seed=seed)
        bootstrapped = bradley_terry.quantiles(drawn, fitted.ratings, level)
        found = map(Rating, self.names, fitted.intervals(level), bootstrapped)
        return sorted(found, key=lambda one: -one.rating.estimate)
