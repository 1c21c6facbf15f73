"""Learning-rate schedules: values worked out by hand, and properties that every schedule has."""

from __future__ import annotations

import itertools
import math

import pytest

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
        ("wsd", LENGTHS, 50, 1e-3 * 51 / 101),
        ("wsd", LENGTHS, 899, 1e-3),
        ("wsd", LENGTHS, 950, 5.5e-4),
        ("wsd", {**LENGTHS, "decay": 400, "shape": "sqrt"}, 700, 1e-4 + 9e-4 * 0.5),
        ("wsd", LENGTHS, 1000, 1e-4),
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
    assert schedule.names() == ["constant", "cosine", "inverse_sqrt", "linear", "wsd"]
