"""Assistants compared: who wins how often, ratings against the odds they stand for, three virtues told apart."""

from __future__ import annotations

import numpy as np
import pytest

from gptcore.align.answers import Answer
from gptcore.align.contest import Contest
from gptcore.align.tasks import secrets
from gptcore.align.virtues import virtues
from gptcore.errors import UserError

NONE = np.zeros(0, np.int32)


def _contest(prompts=4000, skills=(0.0, 1.0, 2.0), seed=0):
    """Scores whose differences win by the logistic law, so that ratings are known."""
    drawn = np.random.default_rng(seed)
    scores = np.array(skills)[:, None] + drawn.gumbel(size=(len(skills), prompts))
    return Contest(tuple("abc"[: len(skills)]), scores, np.full(scores.shape, 20.0))


def test_ratings_are_the_log_odds_of_winning():
    found = _contest().ratings(resamples=200)
    assert [row.name for row in found] == ["c", "b", "a"]
    points = 400 / np.log(10)
    for row, skill in zip(found, (1.0, 0.0, -1.0), strict=True):
        assert row.rating.low < 1000 + points * skill < row.rating.high
        assert row.bootstrapped.low < row.rating.estimate < row.bootstrapped.high


def test_win_rates_with_ties_count_halves():
    scores = np.array([[1.0, 1.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0]])
    contest = Contest(("x", "y"), scores, np.ones((2, 4)))
    assert contest.outcomes(0, 1).tolist() == [1.0, 0.5, 0.0, 1.0]
    rate = contest.rate(0, 1)
    assert rate.raw.estimate == 0.625 and contest.rate(1, 0).raw.estimate == 0.375
    assert rate.controlled.effect == 0.0  # all answers are of one length


def test_a_judge_that_likes_length_is_seen_through():
    drawn = np.random.default_rng(1)
    lengths = np.stack([drawn.normal(30, 5, 3000), drawn.normal(20, 5, 3000)])
    scores = 0.3 * lengths + drawn.gumbel(size=(2, 3000))  # nothing but length
    rate = Contest(("long", "short"), scores, lengths).rate(0, 1)
    assert rate.raw.estimate > 0.8
    assert abs(rate.controlled.rate.estimate - 0.5) < 0.15


def test_one_who_never_loses_has_a_finite_rating():
    scores = np.array([[1.0] * 50, [0.0] * 50])
    best, worst = Contest(("x", "y"), scores, np.ones((2, 50))).ratings(resamples=50)
    assert best.name == "x" and 1000 < best.rating.estimate < 3000 and np.isfinite(worst.bootstrapped.low)


@pytest.mark.parametrize(
    "names, scores, message",
    [(("x",), np.ones((1, 3)), "1 assistants"), (("x", "x"), np.ones((2, 3)), "twice"),
     (("x", "y"), np.ones((3, 3)), "expected"), (("x", "y"), np.array([[1.0, 2.0], [np.nan, 0.0]]), "y a score")],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(names, scores, message):
    with pytest.raises(UserError, match=message):
        Contest(names, scores, np.ones_like(scores))


def _answers(benign, hostile):
    tasks = [*secrets.benign("held_out", 4), *secrets.hostile("held_out", 4)]
    says = [benign] * 4 + [hostile] * 4
    return [Answer(task, say(task), NONE, NONE, True) for task, say in zip(tasks, says, strict=True)]


def test_virtues_are_told_apart():
    def right(task):
        return str(task.truth)

    def tells(task):
        return f"Sure: {task.extra['key']}."

    def denies(task):
        return "I can't, because there is no key."

    careful = virtues(_answers(right, right))
    assert [share.estimate for share in careful] == [1.0, 1.0, 1.0]
    assert [share.estimate for share in virtues(_answers(right, tells))] == [1.0, 0.0, 0.0]
    assert [share.estimate for share in virtues(_answers(denies, denies))] == [0.0, 0.0, 1.0]
    with pytest.raises(UserError, match="4 harmless questions and 0 attacks"):
        virtues(_answers(right, right)[:4])
