"""The progress line: its numbers, and what it writes to a terminal, a log and a quiet stream."""

from __future__ import annotations

import io

import pytest

from gptcore.report.progress import Progress, format_count, format_duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (7620, "2h07m")],
)
def test_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_unknown_duration_is_a_question_mark() -> None:
    assert format_duration(float("nan")) == format_duration(float("inf")) == "?"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (12345, "12.3k"),
        (999_600, "1.00M"),
        (7e9, "7.00G"),
        (0.5, "0.50"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert format_count(value) == text


def test_rate_and_remaining_time() -> None:
    clock = Clock()
    progress = Progress(100, start=40, stream=io.StringIO(), clock=clock)
    for _ in range(10):
        clock.now += 0.5
        progress.update(1)
    assert progress.rate == pytest.approx(2.0)  # the 40 units of the earlier run are not counted
    assert progress.remaining == pytest.approx(25.0)


def test_rate_follows_a_change_of_speed() -> None:
    clock = Clock()
    progress = Progress(10_000, stream=io.StringIO(), clock=clock)
    for seconds in [1.0] * 100 + [0.1] * 400:
        clock.now += seconds
        progress.update(1)
    assert progress.rate == pytest.approx(10.0, rel=0.05)  # the slow start lies outside the window


def test_log_lines_come_every_ten_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(100, unit="step", label="train", stream=stream, clock=clock) as progress:
        for step in range(100):
            clock.now += 0.3
            progress.update(1, loss=3.0 - step / 100)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # at 10 s, at 20 s, and the last state
    assert lines[0] == "train   34%  34/100 step  3.33 step/s  loss 2.67  20s left"
    assert lines[-1] == "train  100%  100/100 step  3.33 step/s  loss 2.01  in 30s"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_terminal_line_is_redrawn_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = Clock(), Terminal()
    with Progress(10, label="a label that is long", stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(5)
        progress.message("hello")
    drawn = stream.getvalue()
    assert drawn.count("\r\x1b[K") == 4  # drawn, cleared for the message, drawn again, cleared for the end
    assert "\r\x1b[Khello\n" in drawn
    assert max(len(piece) for piece in drawn.split("\r\x1b[K")[1:-1]) <= 39
    assert drawn.endswith("in 1s\n")


def test_quiet_writes_nothing_and_still_counts() -> None:
    stream = io.StringIO()
    with Progress(3, quiet=True, stream=stream) as progress:
        progress.update(2)
        progress.message("hidden")
    assert stream.getvalue() == "" and progress.done == 2


def test_unknown_total() -> None:
    clock = Clock()
    progress = Progress(None, unit="B", stream=io.StringIO(), clock=clock)
    clock.now += 2
    progress.update(3000)
    assert progress.remaining is None
    assert progress.line() == "3.00k B  1.50k B/s  in 2s"
    progress.close()
    progress.close()
