"""Statistics and interleaving of the harness, on figures whose answer is known."""

from __future__ import annotations

import math

import pytest

from bench.case import Cost
from bench.machine import Ceilings, drift
from bench.timing import interleave, quantile, statistics


def test_quantile_interpolates_between_order_statistics():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([10.0, 20.0, 30.0], 0.25) == 15.0
    assert quantile([7.0], 0.9) == 7.0
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_statistics_ignore_one_wild_sample():
    found = statistics([1.0] * 9 + [100.0])
    assert (found.median, found.spread, found.repeats) == (1.0, 0.0, 10)
    assert statistics([1.0, 2.0, 3.0]).spread == pytest.approx(0.5)


def test_interleaving_alternates_and_rotates():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    # A warm time of a second makes one call a sample.
    samples = interleave(calls, repeats=4, warm=dict.fromkeys("ABC", 1.0))
    assert "".join(order) == "ABCBCACABABC"
    assert {name: len(values) for name, values in samples.items()} == {"A": 4, "B": 4, "C": 4}


def test_short_calls_are_repeated_within_a_sample():
    count = {"A": 0}

    def call() -> None:
        count["A"] += 1

    interleave({"A": call}, repeats=3, warm={"A": 1e-5})
    assert count["A"] == 300  # 1 ms a sample at 10 µs a call, three times
    count["A"] = 0
    flushed: list[int] = []
    interleave({"A": call}, repeats=3, warm={"A": 1e-5}, flush=lambda: flushed.append(count["A"]))
    assert flushed == [0, 1, 2]  # cold samples are single calls, each after a flush


CEILINGS = Ceilings(
    bandwidth={
        "read": [(1 << 20, 100e9), (1 << 30, 25e9)],
        "copy": [(1 << 20, 80e9), (1 << 30, 20e9)],
        "in_place": [(1 << 20, 160e9), (1 << 30, 50e9)],
    },
    peak={"float32": 400e9, "bfloat16": 2000e9},
    method={"float32": "given", "bfloat16": "given"},
)


def test_bandwidth_is_interpolated_on_a_logarithmic_axis():
    assert CEILINGS.bandwidth_at("copy", 1000) == 80e9
    assert CEILINGS.bandwidth_at("copy", 1 << 40) == 20e9
    assert CEILINGS.bandwidth_at("copy", 1 << 25) == pytest.approx(50e9)  # half of the way in powers of two


def test_the_limit_is_the_slower_of_arithmetic_and_memory():
    big = 1 << 30
    assert CEILINGS.limit_seconds(Cost(flops=400e9), "float32") == pytest.approx(1.0)
    assert CEILINGS.limit_seconds(Cost(flops=400e9), "bfloat16") == pytest.approx(0.2)
    assert CEILINGS.limit_seconds(Cost(read=big), "float32") == pytest.approx(big / 25e9)
    assert CEILINGS.limit_seconds(Cost(read=big, written=big), "float32") == pytest.approx(2 * big / 20e9)
    assert CEILINGS.limit_seconds(Cost(read=big, written=big, in_place=True), "float32") == pytest.approx(
        2 * big / 50e9
    )
    mixed = Cost(read=2 * big, written=big, streams=(("read", big), ("in_place", 2 * big)))
    assert CEILINGS.limit_seconds(mixed, "float32") == pytest.approx(big / 25e9 + 2 * big / 50e9)
    assert CEILINGS.limit_seconds(Cost(flops=400e9, read=big), "float32") == pytest.approx(1.0)
    assert CEILINGS.limit_seconds(Cost(), "float32") == 0.0


def test_ceilings_survive_json():
    import json

    assert Ceilings.from_json(json.loads(json.dumps(CEILINGS.as_json()))) == CEILINGS


def test_drift_is_the_largest_relative_change():
    assert drift((100.0, 10.0), (100.0, 10.0)) == 0.0
    assert math.isclose(drift((100.0, 10.0), (104.0, 9.0)), 0.1)
