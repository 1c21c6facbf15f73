"""Ratings: closed form, coverage in simulated arenas, the unbeaten, ties, speed."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from gptcore.errors import UserError
from gptcore.stats import bradley_terry as bt

RNG = np.random.default_rng


def arena(seed: int, players: int, battles: int, *, ties: float = 0.0) -> tuple[np.ndarray, bt.Counts]:
    """True log-odds, centred, and the counts of random battles."""
    rng = RNG(seed)
    skill = rng.normal(size=players)
    a = rng.integers(0, players, battles)
    b = (a + rng.integers(1, players, battles)) % players
    won = (rng.random(battles) < 1 / (1 + np.exp(skill[b] - skill[a]))).astype(float)
    outcomes = np.where(rng.random(battles) < ties, 0.5, won)
    return skill - skill.mean(), bt.count(a, b, outcomes, players)


@pytest.mark.parametrize(("won", "lost"), [(3, 1), (10, 10), (1, 7), (1_000_000, 1)])
def test_two_players_differ_by_400_log10_of_their_odds(won: int, lost: int) -> None:
    got = bt.fit([[0, won], [lost, 0]], prior=0.0)
    assert got.ratings[0] - got.ratings[1] == pytest.approx(400 * math.log10(won / lost), rel=1e-9, abs=1e-9)
    assert got.ratings.mean() == pytest.approx(1000.0, abs=1e-9)
    # the variance of log-odds is 1 / won + 1 / lost
    width = bt.SCALE * math.sqrt(1 / won + 1 / lost) * 1.959963984540054
    assert got.difference(0, 1).high - got.difference(0, 1).estimate == pytest.approx(width, rel=1e-8)


def test_a_tie_is_half_a_win_for_each() -> None:
    tied = bt.fit([[0, 3], [1, 0]], [[0, 4], [2, 0]])
    halves = bt.fit([[0, 6], [4, 0]])
    np.testing.assert_allclose(tied.ratings, halves.ratings, rtol=0, atol=1e-9)
    assert np.diag(tied.covariance).max() < np.diag(halves.covariance).max()  # but it varies less


def test_the_fit_is_a_maximum() -> None:
    """Expected wins equal wins, for each player (Zermelo 1929)."""
    _, counts = arena(0, 9, 4000)
    got = bt.fit(*counts, prior=0.0).ratings
    for i in range(9):
        games = counts.wins[i] + counts.wins[:, i]
        expected = sum(games[j] * bt.probability(got[i], got[j]) for j in range(9))
        assert expected == pytest.approx(counts.wins[i].sum(), rel=1e-9)


def test_the_unbeaten_and_the_unknown_are_finite_with_a_prior() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1:3], wins[1, 2] = 50, 10  # player 0 unbeaten, player 2 without a win, player 3 never met
    got = bt.fit(wins)
    assert np.isfinite(got.ratings).all() and np.isfinite(got.covariance).all()
    order = np.argsort(-got.ratings).tolist()
    assert order[0] == 0 and order[-1] == 2
    samples = bt.bootstrap(wins, resamples=50)
    assert np.isfinite(samples).all() and samples.shape == (50, 4)


@pytest.mark.parametrize("wins", [[[0, 5], [0, 0]], [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]])
def test_without_a_prior_infinite_ratings_are_refused(wins: list[list[int]]) -> None:
    with pytest.raises(UserError, match="no chain of wins"):
        bt.fit(wins, prior=0.0)


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_both_intervals_cover_the_truth_in_simulated_arenas(ties: float) -> None:
    """12 players, 150 arenas, intervals of 95%. Ties that come whatever the skills draw ratings together, so with
    them the truth is what an endless arena shows."""
    players, battles = 12, 1500
    sandwich, resampled, total = 0, 0, 0
    for seed in range(150):
        skill, counts = arena(seed, players, battles, ties=ties)
        truth = endless(skill, ties) if ties else 1000 + bt.SCALE * skill
        got = bt.fit(*counts)
        drawn = bt.quantiles(bt.bootstrap(*counts, resamples=300, seed=seed), got.ratings)
        for i, (a, b) in enumerate(zip(got.intervals(), drawn, strict=True)):
            sandwich += a.low <= truth[i] <= a.high
            resampled += b.low <= truth[i] <= b.high
            total += 1
    assert 0.93 <= sandwich / total <= 0.97, sandwich / total
    assert 0.93 <= resampled / total <= 0.97, resampled / total


def endless(skill: np.ndarray, ties: float) -> np.ndarray:
    """The ratings of expected outcomes."""
    p = 1 / (1 + np.exp(skill[None, :] - skill[:, None]))
    share = 1e6 * ((1 - ties) * p + ties / 2)
    np.fill_diagonal(share, 0)
    return bt.fit(share, prior=0.0).ratings


def test_bootstrap_spread_is_the_sandwich_and_repeats_itself() -> None:
    _, counts = arena(3, 30, 50_000, ties=0.1)
    samples = bt.bootstrap(*counts, resamples=1500, seed=1)
    ratio = samples.std(0) / np.sqrt(np.diag(bt.fit(*counts).covariance))
    assert ratio.min() >= 0.93 and ratio.max() <= 1.07  # 1,500 resamples tell a deviation to 1.8%
    assert np.array_equal(samples, bt.bootstrap(*counts, resamples=1500, seed=1))


def test_a_resample_is_fitted_as_well_as_newton_would() -> None:
    _, counts = arena(4, 8, 200)  # few battles: the information of the whole data is not that of a resample
    drawn = bt._resampled(counts.wins, 40, RNG(0))
    start = bt._newton(counts.wins, 1.0, np.zeros(8))
    slow = np.array([bt._newton(each.astype(np.float64), 1.0, np.zeros(8)) for each in drawn])
    np.testing.assert_allclose(bt._refit(drawn, 1.0, start), slow, rtol=0, atol=1e-3)


def test_resamples_of_many_battles_arrive_without_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    # a sum of f32 slopes that is not quite 0 would move all players together and never end
    _, counts = arena(7, 80, 400_000)
    start = bt._newton(counts.wins, 1.0, np.zeros(80))
    drawn = bt._resampled(counts.wins, 30, RNG(0))
    monkeypatch.setattr(bt, "_newton", lambda *_: pytest.fail("a resample did not arrive"))
    assert np.isfinite(bt._refit(drawn, 1.0, start)).all()


def test_a_million_battles_of_200_models_and_1000_resamples_take_seconds() -> None:
    """Two quiet cores take a few seconds; the bound is of processor time, so that neighbours do not count."""
    _, counts = arena(5, 200, 1_000_000, ties=0.1)
    start = time.process_time()
    got = bt.fit(*counts)
    samples = bt.bootstrap(*counts)
    assert time.process_time() - start < 20
    assert samples.shape == (1000, 200)
    spread = samples.std(0) / np.sqrt(np.diag(got.covariance))
    assert spread.min() > 0.88 and spread.max() < 1.12


def test_elo_of_a_long_arena_comes_near_the_fit() -> None:
    rng = RNG(6)
    skill = np.array([0.5, 0.0, -0.5])
    a = rng.integers(0, 3, 30_000)
    b = (a + rng.integers(1, 3, 30_000)) % 3
    y = (rng.random(30_000) < 1 / (1 + np.exp(skill[b] - skill[a]))).astype(float)
    got = bt.elo(a, b, y, 3)
    assert got.sum() == pytest.approx(3000, abs=1e-6)
    assert np.abs(got - bt.fit(*bt.count(a, b, y, 3)).ratings).max() < 40
    assert not np.array_equal(got, bt.elo(a[::-1], b[::-1], y[::-1], 3))  # order counts


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bt.count([0], [0], [1], 2), "two different players"),
        (lambda: bt.count([0], [5], [1], 2), "of 0 to 1"),
        (lambda: bt.count([0], [1], [2], 2), "1, 0 or 0.5"),
        (lambda: bt.fit([[0, 1, 2], [1, 0, 2]]), "expected \\(players, players\\)"),
        (lambda: bt.fit([[0, -1], [1, 0]]), "at least 0"),
        (lambda: bt.fit([[1, 1], [1, 0]]), "between a player and itself"),
        (lambda: bt.bootstrap([[0, 1], [1, 0]], prior=0.0), "prior is 0.0"),
    ],
)
def test_bad_input_is_named(call, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()
