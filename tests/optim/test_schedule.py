"""Learning-rate schedules: values worked out by hand, and properties that every schedule has."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import UserError
from gptcore.optim import schedule

LENGTHS = {"steps": 1000, "warmup": 100, "floor": 1e-4}


@pytest.mark.parametrize(
    ("name", "options", "step", "want"),
    [
        ("constant", {}, 0, 1e-3),
        ("constant", {"warmup": 9}, 0, 1e-4),
        ("constant", {"warmup": 9}, 4, 5e-4),
        ("cosine", LENGTHS, 0, 1e-3 / 101),
        ("cosine", LENGTHS, 99, 1e-3 * 100 / 101),
        ("cosine", LENGTHS, 100, 1e-3),
        ("cosine", LENGTHS, 550, 5.5e-4),  # half way: the mean of peak and floor
        ("cosine", LENGTHS, 325, 1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2),
        ("cosine", LENGTHS, 1000, 1e-4),
        ("cosine", LENGTHS, 5000, 1e-4),
        ("linear", LENGTHS, 100, 1e-3),
        ("linear", LENGTHS, 325, 1e-3 - 9e-4 / 4),
        ("linear", LENGTHS, 2000, 1e-4),
        ("inverse_sqrt", {"warmup": 100}, 0, 1e-3),
        ("inverse_sqrt", {"warmup": 100}, 99, 1e-3),
        ("inverse_sqrt", {"warmup": 100}, 399, 5e-4),
        ("palm", {}, 9_999, 1e-3),
        ("palm", {}, 39_999, 5e-4),
        ("wsd", LENGTHS, 50, 1e-3 * 51 / 101),
        ("wsd", LENGTHS, 899, 1e-3),
        ("wsd", LENGTHS, 950, 5.5e-4),
        ("wsd", {**LENGTHS, "decay": 400, "shape": "sqrt"}, 700, 1e-4 + 9e-4 * 0.5),
        ("wsd", LENGTHS, 1000, 1e-4),
        ("wsd", {**LENGTHS, "shape": "exponential"}, 950, math.sqrt(1e-3 * 1e-4)),
        ("wsd", {**LENGTHS, "shape": "exponential"}, 1000, 1e-4),
    ],
)
def test_values(name: str, options: dict[str, float], step: int, want: float) -> None:
    assert schedule.get(name)(step, peak=1e-3, **options) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_no_jump_at_the_joints(name: str) -> None:
    """Neighbouring rates differ by no more than the steepest slope: pi/2 times a straight line's, or the
    decay over a tenth for wsd."""
    rates = [schedule.get(name)(step, peak=1.0, steps=1000, warmup=100, floor=0.1) for step in range(1200)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 0.0101
    assert rates[100] == max(rates) == 1.0 and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(0, 0), (1, 0), (5, 5), (5, 9)])
def test_short_runs_have_finite_rates(name: str, steps: int, warmup: int) -> None:
    rates = [schedule.get(name)(s, peak=1.0, steps=steps, warmup=warmup) for s in range(steps + 2)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        schedule.get("cosin")
    assert schedule.names() == ["constant", "cosine", "inverse_sqrt", "linear", "palm", "wsd"]


def test_palm_is_the_papers_formula() -> None:
    """Section 5: 10^-2 for the first 10,000 steps, then 1 / sqrt(k) with k the step number."""
    for k in (1, 5_000, 10_000, 10_001, 40_000, 255_000):
        assert schedule.palm(k - 1) == pytest.approx(1e-2 if k <= 10_000 else 1 / math.sqrt(k), rel=1e-12)


def test_t5_is_the_papers_formula() -> None:
    """Section 3.1.2: 1 / sqrt(max(n, k)) with k = 10,000 warm-up steps."""
    for n in (1, 10_000, 20_000, 2**19):
        got = schedule.inverse_sqrt(n - 1, peak=1e-2, warmup=10_000)
        assert got == pytest.approx(1 / math.sqrt(max(n, 10_000)), rel=1e-12)


def test_an_exponential_decay_needs_a_floor() -> None:
    with pytest.raises(UserError, match="wsd: argument 'floor': got 0.0"):
        schedule.wsd(990, peak=1.0, steps=1000, shape="exponential")


def test_batch_tokens_grow_linearly() -> None:
    """GPT-3 175B: 32k to 3.2M tokens over 12 billion."""
    batch = functools.partial(schedule.batch_tokens, full=3_200_000, ramp=12_000_000_000)
    assert batch(0) == 32_000
    assert batch(6_000_000_000) == (32_000 + 3_200_000) // 2
    assert batch(12_000_000_000) == batch(300_000_000_000) == 3_200_000
    assert schedule.batch_tokens(0, full=16_000) == 16_000, "never more than the full batch"


@given(
    size=st.integers(1, 4096),
    full=st.integers(1, 40),
    start=st.integers(0, 50_000),
    ramp=st.integers(0, 1_000_000),
    order=st.permutations(range(30)),
)
def test_updates_take_all_micro_batches_in_order(
    size: int, full: int, start: int, ramp: int, order: list[int]
) -> None:
    """Whatever order updates are asked for in, as after a resume; counts never fall and follow the tokens seen."""
    one = schedule.BatchRamp(size, full, start, ramp)
    asked = {step: one.micro_batches(step) for step in order}
    ranges = [asked[step] for step in sorted(asked)]
    assert ranges[0].start == 0
    assert all(a.stop == b.start and len(a) <= len(b) <= full for a, b in itertools.pairwise(ranges))
    for r in ranges:
        tokens = schedule.batch_tokens(r.start * size, full=full * size, start=start, ramp=ramp)
        assert len(r) == 1 or abs(len(r) * size - tokens) <= size / 2


def test_a_long_ramp_reaches_the_full_batch() -> None:
    """From 32k to 0.5M tokens over 4 billion, in micro-batches of 8k: the number of updates by the integral."""
    ramp = schedule.BatchRamp(8_000, 64)
    steps = next(s for s in range(10**6) if len(ramp.micro_batches(s)) == 64)
    # dT / ds = start + (full - start) T / ramp gives ramp / (full - start) ln(full / start) updates; 64 begins
    # half a micro-batch before the end, and each update sees the size of its beginning.
    assert steps == pytest.approx(4e9 / 480_000 * math.log(16), rel=0.01)
    assert ramp.micro_batches(10**7).start == ramp.micro_batches(steps).start + 64 * (10**7 - steps)
