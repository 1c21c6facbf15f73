"""The shuffle by arithmetic: a bijection for every size and key, and random enough to be one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.data.permutation import derive, permute, random_below


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=150, deadline=None)
def test_bijective(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(st.integers(1, 2**60), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=100, deadline=None)
def test_any_size_stays_inside_and_apart(n: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=20)), np.int64)
    images = permute(positions, n, key)
    assert len(np.unique(images)) == len(positions)
    assert not positions.size or (images.min() >= 0 and images.max() < n)


def test_elements_do_not_depend_on_their_company() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    assert [int(permute(np.array([i]), 1000, 7)[0]) for i in (0, 1, 500, 999)] == whole[
        [0, 1, 500, 999]
    ].tolist()


def test_known_values() -> None:
    """The order of a run is a promise: these numbers may never change."""
    assert permute(np.arange(6), 6, derive(0, 1, 0, 0)).tolist() == [4, 0, 1, 5, 3, 2]
    assert derive(1337, 1, 2) == 0xC28B4E3313F31586
    assert random_below(1000, 5, np.arange(4)).tolist() == [906, 672, 272, 384]


def test_looks_random() -> None:
    """Over 400 keys each item lands on each of 20 places about 20 times.

    The statistic is chi-square with 19 * 19 degrees of freedom: mean 361, deviation 27; five deviations
    either way are passed by chance in all but one of a million tries, and the keys are fixed.
    """
    n, keys = 20, 400
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, derive(0, key))] += 1
    statistic = float(((counts - keys / n) ** 2 / (keys / n)).sum())
    assert 361 - 5 * 27 < statistic < 361 + 5 * 27


def test_neighbours_separate() -> None:
    """Of 10,000 neighbouring pairs about two stay neighbours in a shuffle, as often as by chance."""
    order = permute(np.arange(10_000), 10_000, derive(3))
    assert np.count_nonzero(np.diff(order) == 1) < 10
    assert (
        abs(float(np.corrcoef(np.arange(10_000), order)[0, 1])) < 0.05
    )  # five deviations of 1 / sqrt(10,000)


def test_draws_are_uniform() -> None:
    counts = np.bincount(random_below(10, derive(1), np.arange(100_000)), minlength=10)
    assert abs(counts - 10_000).max() < 5 * 95  # binomial deviation: sqrt(100,000 * 0.1 * 0.9) = 95


def test_keys_differ_by_place() -> None:
    keys = {derive(seed, a, b) for seed in range(4) for a in range(10) for b in range(10)}
    assert len(keys | {derive(0), derive(0, 0), derive(0, 0, 0, 0)}) == 403


def test_positions_outside_are_refused() -> None:
    for position in (-1, 5):
        with pytest.raises(ValueError, match="outside 0 to 4"):
            permute(np.array([position]), 5, 0)
