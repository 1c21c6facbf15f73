"""A progress line: how far, how fast, how long still.

On a terminal one line is redrawn in place; in a log file or a pipe a plain line is written now and
then. The standard library only, so that data, training and generation can all use it::

    with Progress(steps, unit="step", label="train") as progress:
        for step in range(steps):
            loss = ...
            progress.update(1, loss=loss)
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_TERMINAL_INTERVAL = 0.1  # seconds between redraws: smooth to the eye, unmeasurable in the loop
_LOG_INTERVAL = 10.0  # seconds between lines of a log, so that an hour of training stays readable
_WINDOW = 30.0  # seconds the rate looks back: it follows a change of speed, yet does not jump with every step


def format_duration(seconds: float) -> str:
    """``seconds`` as ``12s``, ``3m05s`` or ``2h07m``; ``?`` for what is not known."""
    if not seconds >= 0 or seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_count(value: float) -> str:
    """A count in three digits with a decimal prefix: ``999``, ``12.3k``, ``4.56M``, ``7.00G``."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{max(0, 2 - len(str(int(abs(scaled)))) + 1)}f}{prefix}"
    return f"{value:.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.2f}"


def format_field(value: object) -> str:
    """A field of the line: floats to four significant digits, everything else as it prints."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Progress:
    """Progress over ``total`` units, shown at most ten times a second.

    ``total``: units until done, or None when unknown (then neither share nor remaining time is shown).
    ``unit``: what is counted (``"step"``, ``"B"``, ``"token"``). ``label``: what is being done.
    ``start``: units already done before this run (a resumed training); they don't count into the rate.
    ``quiet``: show nothing. ``stream``: default standard error. ``clock``: seconds, for tests.

    ``update`` costs about a microsecond when nothing is drawn.
    """

    def __init__(
        self,
        total: float | None = None,
        *,
        unit: str = "",
        label: str = "",
        start: float = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.unit = unit
        self.label = label
        self.done = start
        self.fields: dict[str, object] = {}
        self._start = start
        self._quiet = quiet
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._terminal = not quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._interval = _TERMINAL_INTERVAL if self._terminal else _LOG_INTERVAL
        self._began = clock()
        self._next_draw = self._began + self._interval
        self._points: deque[tuple[float, float]] = deque([(self._began, start)])
        self._next_point = self._began + 0.1
        self._drawn = False  # a terminal line is on the screen now
        self._closed = False

    @property
    def rate(self) -> float:
        """Units per second over the last half minute; 0.0 before the first update."""
        now = self._clock()
        then, before = self._points[0]
        return (self.done - before) / (now - then) if now > then else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    @property
    def remaining(self) -> float | None:
        """Seconds still to go at the present rate; None when total or rate are unknown."""
        rate = self.rate
        return None if self.total is None or rate <= 0 else max(0.0, (self.total - self.done) / rate)

    def update(self, n: float = 1, **fields: object) -> None:
        """``n`` more units are done; ``fields`` (loss=..., lr=...) are shown beside them from now on."""
        self.done += n
        if fields:
            self.fields.update(fields)
        if self._quiet or self._closed:
            return
        now = self._clock()
        if now >= self._next_point:
            self._next_point = now + 0.1
            self._points.append((now, self.done))
            while now - self._points[1][0] > _WINDOW:
                self._points.popleft()
        if now >= self._next_draw:
            self._next_draw = now + self._interval
            self._draw()

    def message(self, text: str) -> None:
        """Print a line of its own (an evaluation, a sample) without tearing the progress line."""
        if self._quiet:
            return
        self._clear()
        print(text, file=self._stream, flush=True)
        if self._terminal and not self._closed:
            self._draw()

    def close(self) -> None:
        """Leave the last state on its own line. Called by ``with``; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._quiet:
            return
        self._points = deque([(self._began, self._start)])  # the last line shows the mean rate of the run
        self._clear()
        print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """The text of the line, without colour or control characters."""
        parts = [self.label] if self.label else []
        unit = f" {self.unit}" if self.unit else ""
        if self.total is None:
            parts.append(f"{format_count(self.done)}{unit}")
        else:
            share = self.done / self.total if self.total else 1.0
            parts.append(f"{100 * share:3.0f}%")
            if self._terminal and not self._closed:
                parts.append(self._bar(min(1.0, max(0.0, share))))
            parts.append(f"{format_count(self.done)}/{format_count(self.total)}{unit}")
        parts.append(f"{format_count(self.rate)}{unit}/s")
        parts.extend(f"{name} {format_field(value)}" for name, value in self.fields.items())
        remaining = self.remaining
        if self._closed or remaining is None:
            parts.append(f"in {format_duration(self.elapsed)}")
        else:
            parts.append(f"{format_duration(remaining)} left")
        return "  ".join(parts)

    def _bar(self, share: float, cells: int = 20) -> str:
        filled = round(share * cells)
        unicode = (getattr(self._stream, "encoding", None) or "").lower().startswith("utf")
        full, empty = ("━", "─") if unicode else ("#", "-")
        return full * filled + empty * (cells - filled)

    def _draw(self) -> None:
        if not self._terminal:
            print(self.line(), file=self._stream, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1  # a full line would wrap and no longer be redrawn
        self._stream.write(f"\r\x1b[K{self.line()[:width]}")
        self._stream.flush()
        self._drawn = True

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
