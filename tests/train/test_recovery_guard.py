"""The detectors by themselves: the robust z-score, patience, policies and their state; and the event log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.train import events
from gptcore.train.events import EventLog
from gptcore.train.guard import GAUSSIAN_MAD, LEAST_SPREAD, Guard, Verdict, Window
from gptcore.train.recovery_spec import RecoverySpec


def spec(**changes: Any) -> RecoverySpec:
    return RecoverySpec(**{"loss": "rewind", "grad_norm": "off", "window": 16, "least": 8, **changes})


def feed(guard: Guard, losses: list[float], start: int = 0) -> list[Verdict]:
    return [guard.judge(step, loss, 1.0, guard.look(loss, 1.0)) for step, loss in enumerate(losses, start)]


def test_the_spread_of_a_gaussian_is_its_standard_deviation() -> None:
    """1.4826 is 1 / quantile(0.75): the MAD of 10^5 draws times it is sigma, to the 0.5% that they leave."""
    x = np.random.default_rng(0).normal(3.0, 0.5, 100_000)
    assert GAUSSIAN_MAD * np.median(np.abs(x - np.median(x))) == pytest.approx(0.5, rel=0.005)


@given(st.lists(st.floats(0.1, 100), min_size=8, max_size=40), st.floats(0.1, 1000))
def test_outliers_are_those_of_numpy(values: list[float], x: float) -> None:
    """Window of 16: the median, MAD and z of the last 16 values in NumPy, whatever went through before."""
    window = Window(16, 8)
    for value in values:
        window.add(value)
    last = np.array(values[-16:])
    median = float(np.median(last))
    spread = max(GAUSSIAN_MAD * float(np.median(np.abs(last - median))), LEAST_SPREAD * median)
    z = (x - median) / spread
    found = window.outlier("loss", x, 6.0)
    if abs(z - 6.0) > 1e-9:
        assert (found is not None) == (z > 6.0)
    if found is not None:
        assert (found.value, found.median) == (x, median) and found.z == pytest.approx(z, rel=1e-12)


def test_nothing_is_an_outlier_before_there_are_enough_values() -> None:
    guard = Guard(spec())
    assert feed(guard, [1.0] * 7 + [9.0]) == [Verdict()] * 8
    assert feed(guard, [9.0], 8)[0].detector == "loss", "the ninth has eight before it"


def test_a_spike_needs_patience_and_is_found_within_it() -> None:
    noise = np.random.default_rng(1).normal(3.0, 0.01, 32).tolist()
    guard = Guard(spec())
    assert {v.action for v in feed(guard, [*noise, 4.0, 4.0, 3.0, 4.0, 4.0])} == {"none"}
    found = feed(Guard(spec()), [*noise, 4.0, 4.0, 4.0, 4.0])[32:]
    assert [v.action for v in found] == ["none", "none", "rewind", "none"]
    assert found[2] == Verdict("rewind", "loss", 32)


def test_a_level_that_stays_becomes_the_usual_one() -> None:
    """Half a window after the loss has doubled it is no outlier any more."""
    guard = Guard(spec())
    feed(guard, [2.0, 2.01] * 8)
    seen = [bool(guard.look(4.0 + 0.01 * (i % 2), 1.0)) or feed(guard, [4.0], 16 + i) for i in range(10)]
    feed(guard, [4.0, 4.01] * 4)
    assert seen[0] is True and guard.look(4.0, 1.0) == []


def test_falls_and_plain_noise_are_not_seen() -> None:
    """10,000 Gaussian updates on a falling curve, at the default window and threshold: not one in a row of three."""
    rng = np.random.default_rng(2)
    curve = 3 + 7 * np.exp(-np.arange(10_000) / 500) + rng.normal(0, 0.05, 10_000)
    guard = Guard(RecoverySpec(loss="rewind"))
    assert {verdict.action for verdict in feed(guard, curve.tolist())} == {"none"}


def test_a_constant_loss_needs_a_rise_of_threshold_times_the_least_spread() -> None:
    guard = Guard(spec())
    feed(guard, [2.0] * 16)
    assert guard.look(2.0 * (1 + 5.9e-3), 1.0) == [] and guard.look(2.0 * (1 + 6.1e-3), 1.0) != []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "grad_norm"])
def test_what_is_not_finite_is_seen_at_once(value: float, place: str) -> None:
    guard = Guard(spec(non_finite="stop"))
    loss, norm = (value, None) if place == "loss" else (1.0, value)
    seen = guard.look(loss, norm)
    assert [s.detector for s in seen] == ["non_finite"] and guard.judge(0, loss, norm, seen).action == "stop"
    assert guard.state()["windows"]["loss"] == ([] if place == "loss" else [1.0])


def test_the_graver_of_two_verdicts_counts() -> None:
    guard = Guard(spec(loss="warn", grad_norm="stop", patience=1))
    feed(guard, [1.0] * 10)
    assert guard.judge(10, 9.0, 9.0, guard.look(9.0, 9.0)) == Verdict("stop", "grad_norm", 10)


def test_skips_are_bounded_and_counted_anew_after_a_good_update() -> None:
    guard = Guard(spec(loss="skip", max_skips=2))
    actions = [v.action for v in feed(guard, [1.0] * 16 + [9.0, 9.0, 1.0, 9.0, 9.0, 9.0])]
    assert actions[16:] == ["skip", "skip", "none", "skip", "skip", "rewind"]


def test_state_goes_through_json_and_decides_the_same() -> None:
    losses = np.random.default_rng(3).normal(3.0, 0.01, 30).tolist() + [5.0] * 4
    straight = feed(Guard(spec()), losses)
    for stop in (5, 20, 31, 32):
        first, second = Guard(spec()), Guard(spec())
        found = feed(first, losses[:stop])
        second.restore(json.loads(json.dumps(first.state())))
        assert found + feed(second, losses[stop:], stop) == straight


def test_the_log_goes_on_where_a_checkpoint_left_it(tmp_path: Path) -> None:
    """What came after is dropped, also a line that a kill cut short; the digest is that of what is there."""
    log = EventLog(tmp_path / "events.jsonl", 0)
    log.write("seen", 3, detector="loss", value=4.0, median=None)
    log.write("seen", 4, detector="non_finite", value=math.nan)
    kept = log.digest
    log.write("decided", 4, policy="rewind")
    assert log.count == 3 and log.digest != kept
    log.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"step": 5, "ki')
    again = EventLog(tmp_path / "events.jsonl", 2)
    assert again.digest == kept
    again.write("done", 4, action="skip")
    again.close()
    assert events.read(tmp_path / "events.jsonl") == [
        {"step": 3, "kind": "seen", "detector": "loss", "value": 4.0},
        {"step": 4, "kind": "seen", "detector": "non_finite", "value": "nan"},
        {"step": 4, "kind": "done", "action": "skip"},
    ]
    times = [json.loads(line)["time"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert times == sorted(times) and times[0] > 1.7e9
