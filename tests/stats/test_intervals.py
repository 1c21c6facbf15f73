"""Intervals cover what they claim to, in simulations, and equal published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptcore.stats import distributions, intervals

RNG = np.random.default_rng


def test_normal_and_student_quantiles() -> None:
    # tables: z of 97.5%, t of 97.5% with 4, 10 and 100 degrees of freedom
    assert distributions.normal_quantile(0.975) == pytest.approx(1.959963984540054, abs=1e-12)
    for freedom, t in ((4, 2.7764451051977987), (10, 2.2281388519649385), (100, 1.9839715184496334)):
        assert distributions.student_quantile(0.975, freedom) == pytest.approx(t, abs=1e-9)
        assert distributions.student_quantile(0.025, freedom) == pytest.approx(-t, abs=1e-9)
        assert distributions.student_two_sided(t, freedom) == pytest.approx(0.05, abs=1e-11)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 5), (30, 3), (0.5, 0.5), (400, 600)])
def test_beta_against_the_binomial_and_its_own_quantiles(a: float, b: float) -> None:
    for x in (0.01, 0.3, 0.5, 0.9):
        if a == int(a):
            n = int(a + b - 1)
            tail = math.fsum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(int(a), n + 1))
            assert distributions.beta_cdf(x, a, b) == pytest.approx(tail, rel=1e-9, abs=1e-13)
    for p in (0.025, 0.5, 0.975):
        assert distributions.beta_cdf(distributions.beta_quantile(p, a, b), a, b) == pytest.approx(
            p, abs=1e-12
        )


def test_arcsine_distribution() -> None:
    for x in (0.1, 0.5, 0.8):
        assert distributions.beta_cdf(x, 0.5, 0.5) == pytest.approx(
            2 / math.pi * math.asin(math.sqrt(x)), abs=1e-13
        )


def test_exact_binomial_agrees_with_its_other_form() -> None:
    for k, n in ((400, 999), (480, 999)):
        other = 2 * distributions.beta_cdf(0.5, n - k, k + 1)
        assert distributions.binomial_two_sided(k, n) == pytest.approx(other, rel=1e-9)
    assert distributions.binomial_two_sided(5, 10) == 1.0
    assert distributions.binomial_two_sided(0, 10) == pytest.approx(2 / 1024, rel=1e-15)
    assert distributions.binomial_two_sided(480, 1000) == pytest.approx(0.2174, abs=2e-4)


def test_wilson_and_clopper_pearson_against_published_numbers() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for (r, n), wilson, exact in (
        ((81, 263), (0.2553, 0.3662), (0.2527, 0.3676)),
        ((15, 148), (0.0624, 0.1605), (0.0578, 0.1617)),
        ((0, 20), (0.0, 0.1611), (0.0, 0.1684)),
        ((1, 29), (0.0061, 0.1718), (0.0009, 0.1776)),
    ):
        assert intervals.wilson(r, n)[1:] == pytest.approx(wilson, abs=5e-5)
        assert intervals.clopper_pearson(r, n)[1:] == pytest.approx(exact, abs=5e-5)


@pytest.mark.parametrize(("p", "n"), [(0.1, 120), (0.37, 75), (0.5, 200), (0.9, 400)])
def test_shares_are_covered(p: float, n: int) -> None:
    draws = np.bincount(RNG(1).binomial(n, p, 20_000), minlength=n + 1) / 20_000
    for of, low, high in ((intervals.wilson, 0.93, 0.97), (intervals.clopper_pearson, 0.948, 0.985)):
        inside = [lo <= p <= hi for _, lo, hi in (of(k, n) for k in range(n + 1))]
        assert low <= float(draws @ np.array(inside)) <= high


def test_means_and_paired_differences_are_covered() -> None:
    rng, hits, paired_hits = RNG(2), 0, 0
    for _ in range(2000):
        shared = rng.normal(size=12) * 5
        a, b = shared + rng.normal(size=12) + 0.3, shared + rng.normal(size=12)
        _, low, high = intervals.mean(a)
        hits += low <= 0.3 <= high
        _, low, high = intervals.difference(a, b)
        paired_hits += low <= 0.3 <= high
    assert 0.93 <= hits / 2000 <= 0.97 and 0.93 <= paired_hits / 2000 <= 0.97
    assert intervals.difference(a, b).high - intervals.difference(a, b).low < 4  # what is shared cancels


@pytest.mark.parametrize("statistic", ["mean", "ratio"])
def test_the_bootstrap_covers(statistic: str) -> None:
    rng, hits, rounds = RNG(3), 0, 600
    of = None if statistic == "mean" else (lambda x: x[..., 0].sum(1) / x[..., 1].sum(1))
    for i in range(rounds):
        if statistic == "mean":
            low, high = intervals.bootstrap(rng.exponential(size=60), resamples=600, seed=i)[1:]
            hits += low <= 1.0 <= high
        else:
            bottom = rng.uniform(1, 3, 60)
            rows = np.stack([2 * bottom + rng.normal(size=60), bottom], 1)
            low, high = intervals.bootstrap(rows, of, resamples=600, seed=i)[1:]
            hits += low <= 2.0 <= high
    # 600 rounds have a standard error of 0.9 points; skewed means of 60 are covered 93.5% of the time by BCa
    assert 0.915 <= hits / rounds <= 0.975


def test_the_bootstrap_repeats_itself_and_takes_constants() -> None:
    x = RNG(4).normal(size=30)
    assert intervals.bootstrap(x, seed=7) == intervals.bootstrap(x, seed=7) != intervals.bootstrap(x, seed=8)
    assert intervals.bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: intervals.wilson(3, 2), "successes is 3"),
        (lambda: intervals.wilson(0, 0), "trials is 0"),
        (lambda: intervals.wilson(1, 2, level=95), "level is 95"),
        (lambda: intervals.mean([1.0]), "has 1 values, expected at least 2"),
        (lambda: intervals.mean([1.0, math.nan]), "values\\[1\\] is nan"),
        (lambda: intervals.difference([1, 2], [1, 2, 3]), "of one length"),
        (lambda: intervals.bootstrap([1, 2], resamples=5), "resamples is 5"),
    ],
)
def test_bad_input_is_named(call, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()
