"""Win rates, pass@k, the area under the curve, calibration: against enumeration and in simulations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gptcore.stats import calibration, pass_at_k, roc, win_rate

RNG = np.random.default_rng


@pytest.mark.parametrize(("n", "c"), [(10, 3), (200, 1), (5, 0), (5, 5)])
def test_pass_at_1_is_the_share_of_passes(n: int, c: int) -> None:
    assert pass_at_k.pass_at_k(n, c, 1) == pytest.approx(c / n, rel=1e-12)


def test_pass_at_k_by_enumerating_subsets() -> None:
    for n, c, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if c <= n and k <= n:
            right = sum(any(i < c for i in s) for s in itertools.combinations(range(n), k))
            truth = right / len(list(itertools.combinations(range(n), k)))
            assert pass_at_k.pass_at_k(n, c, k) == pytest.approx(truth, abs=1e-14)


def test_pass_at_k_over_problems_covers() -> None:
    rng, hits = RNG(0), 0
    truth = 1 - np.mean((1 - np.random.default_rng(1).beta(1, 2, 200_000)) ** 5)
    for i in range(300):
        c = rng.binomial(20, rng.beta(1, 2, 80))
        _, low, high = pass_at_k.over_problems(20, c, 5, seed=i)
        hits += low <= truth <= high
    assert 0.915 <= hits / 300 <= 0.98  # standard error 1.3 points


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_win_rates_cover(ties: float) -> None:
    rng, hits = RNG(2), 0
    wins, losses, tied = rng.multinomial(150, [0.65 * (1 - ties), 0.35 * (1 - ties), ties], 4000).T
    truth = 0.65 * (1 - ties) + ties / 2
    for a, b, c in zip(wins, losses, tied, strict=True):
        _, low, high = win_rate.win_rate(int(a), int(b), int(c))
        hits += low <= truth <= high
    assert 0.93 <= hits / 4000 <= 0.97


def simulated(seed: int, skill: float, effect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = RNG(seed)
    ours, theirs = rng.normal(300, 60, 400), rng.normal(200, 60, 400)
    d = ours - theirs
    p = 1 / (1 + np.exp(-skill - effect * np.tanh(d / d.std())))
    return (rng.random(400) < p).astype(float), ours, theirs


def test_length_controlled_win_rate_takes_verbosity_out_and_covers() -> None:
    """A model as good as the baseline that writes half as much again, before a judge who likes length."""
    hits, raw = 0, []
    for seed in range(400):
        got = win_rate.length_controlled(*simulated(seed, 0.0, 1.5))
        hits += got.rate.low <= 0.5 <= got.rate.high
        raw.append(got.raw.estimate)
        assert got.effect > 0
    assert 0.93 <= hits / 400 <= 0.975
    assert np.mean(raw) > 0.7


def test_length_controlled_equals_raw_where_lengths_do_not_differ_and_is_finite_for_the_unbeaten() -> None:
    outcomes = np.array([1.0] * 70 + [0.0] * 30)
    got = win_rate.length_controlled(outcomes, np.full(100, 5), np.full(100, 5), prior=0.0)
    assert got.rate.estimate == pytest.approx(0.7, abs=1e-6) and got.effect == pytest.approx(0.0, abs=1e-9)
    best = win_rate.length_controlled(np.ones(50), np.arange(50), np.zeros(50))
    assert 0.9 < best.rate.estimate < 1.0


def test_auc_by_all_pairs_and_its_interval_covers() -> None:
    rng = RNG(3)
    x, y = rng.integers(0, 6, 40).astype(float), rng.integers(0, 2, 40)
    pairs = [(a > b) + 0.5 * (a == b) for a in x[y == 1] for b in x[y == 0]]
    assert roc.auc(x, y).estimate == pytest.approx(np.mean(pairs), abs=1e-12)
    assert roc.auc(y, y).estimate == 1.0
    hits = 0
    truth = 0.7602499389065233  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for _ in range(1000):
        labels = np.repeat([0, 1], 60)
        _, low, high = roc.auc(rng.normal(size=120) + labels, labels)
        hits += low <= truth <= high
    assert 0.93 <= hits / 1000 <= 0.97


def test_calibration_of_honest_and_of_boastful_forecasts() -> None:
    rng = RNG(4)
    p = rng.random(50_000)
    y = (rng.random(50_000) < p).astype(float)
    honest = calibration.calibration(p, y)
    assert honest.error < 0.01 and honest.brier == pytest.approx(1 / 6, abs=0.003)
    assert honest.log_loss == pytest.approx(0.5, abs=0.01)
    assert sum(b.number for b in honest.bins) == 50_000
    assert sum(b.observed.low <= b.forecast <= b.observed.high for b in honest.bins) >= 8
    boastful = calibration.calibration(np.where(p > 0.5, 0.99, 0.01), y)
    assert boastful.error == pytest.approx(0.24, abs=0.01) and boastful.log_loss > 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pass_at_k.pass_at_k(5, 6, 1), "c = 6"),
        (lambda: pass_at_k.pass_at_k(5, 1, 6), "k = 6"),
        (lambda: win_rate.win_rate(0, 0), "is 0, expected at least 1"),
        (lambda: win_rate.length_controlled([1, 2], [1, 2], [1, 2]), "in \\[0, 1\\]"),
        (lambda: roc.auc([1, 2], [1, 1]), "0 negatives"),
        (lambda: calibration.calibration([1.5], [1]), "in \\[0, 1\\]"),
    ],
)
def test_bad_input_is_named(call, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()
