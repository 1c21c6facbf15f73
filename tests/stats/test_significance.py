"""Paired tests against enumeration, published values, and scipy where it is installed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gptcore.stats import significance

RNG = np.random.default_rng


@pytest.mark.parametrize("n", [1, 4, 9])
def test_mcnemar_and_sign_by_enumerating_all_outcomes(n: int) -> None:
    for wins in range(n + 1):
        away = abs(wins - n / 2)
        rare = sum(abs(sum(flips) - n / 2) >= away for flips in itertools.product((0, 1), repeat=n)) / 2**n
        assert significance.mcnemar_counts(wins, n - wins) == pytest.approx(rare, rel=1e-12)
        a = np.array([1.0] * wins + [0.0] * (n - wins) + [1, 0, 1])
        b = np.array([0.0] * wins + [1.0] * (n - wins) + [1, 0, 1])
        assert significance.mcnemar(a, b) == pytest.approx(rare, rel=1e-12)
        assert significance.sign(3 * a, 3 * b) == pytest.approx(rare, rel=1e-12)


@pytest.mark.parametrize("n", [3, 7])
def test_permutation_by_enumerating_all_signs(n: int) -> None:
    a, b = RNG(n).normal(size=(2, n)).round(1)
    d = a - b
    sums = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True)))
        for signs in itertools.product((1, -1), repeat=n)
    ]
    truth = sum(s >= abs(d.sum()) - 1e-12 for s in sums) / len(sums)
    assert significance.permutation(a, b) == pytest.approx(truth, rel=1e-12)


def test_sampled_permutations_agree_with_all_of_them() -> None:
    a, b = RNG(5).normal(size=(2, 15))
    exact, sampled = (
        significance.permutation(a + 0.4, b),
        significance.permutation(a + 0.4, b, resamples=20_000),
    )
    assert sampled != exact and abs(sampled - exact) < 4 * math.sqrt(exact / 20_000)


def test_students_own_data() -> None:
    # "The probable error of a mean" (1908): hours of sleep gained on two drugs, t = -4.0621, p = 0.002833
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert significance.paired_t(first, second) == pytest.approx(0.002833, abs=5e-7)


def test_no_difference_is_no_evidence_and_a_constant_one_is_certain() -> None:
    x = RNG(6).normal(size=8)
    assert significance.paired_t(x, x) == significance.permutation(x, x) == significance.sign(x, x) == 1.0
    assert significance.paired_t([2, 3, 4], [1, 2, 3]) == 0.0


def test_false_alarms_are_as_rare_as_said() -> None:
    rng = RNG(7)
    alarms = np.zeros(3)
    for _ in range(1500):
        a, b = rng.normal(size=(2, 10))
        right, other = rng.random((2, 300)) < 0.6
        p = (significance.paired_t(a, b), significance.permutation(a, b), significance.mcnemar(right, other))
        alarms += np.array(p) < 0.05
    share = alarms / 1500
    assert 0.035 <= share[0] <= 0.065 and 0.035 <= share[1] <= 0.065
    assert share[2] <= 0.055  # the exact test is conservative


def test_holm() -> None:
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]


def test_against_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    a, b = RNG(8).normal(size=(2, 25))
    assert significance.paired_t(a, b) == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue, rel=1e-9)
    truth = scipy_stats.binomtest(int((a > b).sum()), 25).pvalue
    assert significance.sign(a, b) == pytest.approx(truth, rel=1e-9)
    assert significance.mcnemar_counts(40, 21) == pytest.approx(
        scipy_stats.binomtest(40, 61).pvalue, rel=1e-9
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: significance.mcnemar([0, 2], [0, 1]), "a must be 0 or 1"),
        (lambda: significance.paired_t([1], [2]), "at least 2"),
        (lambda: significance.permutation([1, 2], [1]), "of one length"),
        (lambda: significance.mcnemar_counts(-1, 2), "only_a is -1"),
    ],
)
def test_bad_input_is_named(call, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()
