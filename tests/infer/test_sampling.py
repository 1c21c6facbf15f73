"""Sampling: the generator against its published vectors, and each rule against a slow plain one."""

import math

import numpy as np
import pytest

from gptcore.errors import UserError
from gptcore.infer.sampling import (
    SamplingParams,
    draw,
    philox4x32,
    probabilities,
    sample,
    top_k,
    top_p,
    uniform,
)

# the philox4x32 lines with 10 rounds of Random123's known-answer file
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected


def test_uniform_is_spread_evenly_and_depends_on_each_argument():
    numbers = np.array([uniform(5, 0, position) for position in range(4000)])
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    # chi-square with 19 degrees of freedom exceeds 43.8 once in a thousand
    assert ((counts - 200.0) ** 2 / 200.0).sum() < 43.8
    arguments = [(5, 0, 0), (6, 0, 0), (5, 1, 0), (5, 0, 1), (5 + 2**32, 0, 0), (5 + 2**63, 0, 0)]
    assert len({uniform(*each) for each in arguments}) == len(arguments)


def test_top_k_keeps_exactly_k_and_lower_ids_of_ties():
    logits = np.array([1.0, 3.0, 2.0, 2.0, 2.0, -1.0])
    assert np.flatnonzero(np.isfinite(top_k(logits, 3))).tolist() == [1, 2, 3]
    assert top_k(logits, 0) is logits and top_k(logits, 99) is logits


@pytest.mark.parametrize("vocab", [1, 5, 300, 5000])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_p(vocab, p):
    rng = np.random.default_rng(vocab)
    for scale in (0.0, 1.0, 6.0):  # 0: all equal; 6: few tokens hold nearly everything
        probs = np.exp(rng.standard_normal(vocab) * scale)
        probs /= probs.sum()
        kept = top_p(probs, p)
        chosen = np.flatnonzero(kept)
        if p == 1.0:
            assert len(chosen) == vocab
            continue
        order = sorted(range(vocab), key=lambda i: (-probs[i], i))
        mass, count = 0.0, 0
        while mass < p * probs.sum() and count < vocab:
            mass += probs[order[count]]
            count += 1
        # sums taken in another order differ in the last bits, so one token at the boundary may differ
        assert abs(len(chosen) - count) <= 1
        assert set(chosen) == set(order[: len(chosen)])
        assert np.array_equal(kept[chosen], probs[chosen])


def test_temperature_zero_is_greedy_and_large_is_flat():
    logits = np.array([0.0, 5.0, 5.0, 1.0])
    assert sample(logits, SamplingParams(temperature=0.0), 0, 0) == 1
    flat = probabilities(logits, SamplingParams(temperature=1e9, top_p=1.0))
    assert np.allclose(flat, 0.25, rtol=0, atol=1e-8)
    tiny = probabilities(logits, SamplingParams(temperature=1e-300, top_p=1.0))
    assert tiny.tolist() == [0.0, 0.5, 0.5, 0.0]


def test_probabilities_follow_the_order_temperature_top_k_top_p():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    params = SamplingParams(temperature=0.5, top_k=2, top_p=0.79)
    # squared and renormalised over two tokens: 0.8 and 0.2; the first alone reaches 0.79
    two = probabilities(logits, SamplingParams(temperature=0.5, top_k=2, top_p=1.0))
    assert np.allclose(two, [0.8, 0.2, 0, 0])
    assert probabilities(logits, params).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_sampled_frequencies_match_the_distribution():
    probs = np.array([0.5, 0.0, 0.3, 0.2])
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=11)
    with np.errstate(divide="ignore"):
        logits = np.log(probs)
    n = 5000
    counts = np.bincount([sample(logits, params, 0, i) for i in range(n)], minlength=4)
    assert counts[1] == 0
    expected = n * probs[[0, 2, 3]]
    # chi-square with 2 degrees of freedom exceeds 13.8 once in a thousand
    assert ((counts[[0, 2, 3]] - expected) ** 2 / expected).sum() < 13.8


def test_draw_at_the_edges():
    probs = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    assert draw(probs, 0.0) == 1
    assert draw(probs, 0.25) == 3
    assert draw(probs, math.nextafter(1.0, 0.0)) == 3
    assert draw(probs, 1.0) == 3  # as rounding could give


def test_sample_does_not_depend_on_earlier_calls():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 50))
    params = SamplingParams(seed=3)
    forward = [sample(rows[i], params, i, 7) for i in range(6)]
    backward = [sample(rows[i], params, i, 7) for i in reversed(range(6))]
    assert forward == backward[::-1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(UserError, match="not finite"):
        probabilities(np.array([0.0, bad, 1.0]), SamplingParams())
    with pytest.raises(UserError, match="not finite"):
        probabilities(np.full(3, -np.inf), SamplingParams())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"^{name} is"):
        SamplingParams(**{name: value})
