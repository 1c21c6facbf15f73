"""Schedules of learning rate and batch size: pure functions, so that a resumed run needs no schedule state.

``step`` is the zero-based index of the update about to be made. Every rate but the inverse square root and
PaLM's warms up linearly: update ``s < warmup`` gets ``peak * (s + 1) / (warmup + 1)``, so that no update is
wasted on rate zero and the peak is reached exactly at ``step == warmup``. ``floor`` is the rate at the
end (a rate, not a share of the peak) and what later steps keep.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import Literal

from gptcore.errors import UserError, unknown_name


def constant(step: int, *, peak: float, warmup: int = 0) -> float:
    """``peak`` after the warm-up."""
    return _warm(step, peak, warmup)


def linear(step: int, *, peak: float, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """A straight line from ``peak`` at the end of the warm-up to ``floor`` at ``steps``."""
    if step < warmup:
        return _warm(step, peak, warmup)
    return peak + (floor - peak) * _share(step, warmup, steps)


def cosine(step: int, *, peak: float, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Half a cosine from ``peak`` to ``floor`` at ``steps`` (Loshchilov and Hutter 2017, one cycle)."""
    if step < warmup:
        return _warm(step, peak, warmup)
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * _share(step, warmup, steps)))


def inverse_sqrt(step: int, *, peak: float, warmup: int = 10_000) -> float:
    """``peak`` for ``warmup`` updates, then ``peak * sqrt(warmup / k)`` for update k = step + 1.

    T5 (Raffel et al. 2020, section 3.1.2): ``1 / sqrt(max(k, warmup))``, which is ``peak = 1 / sqrt(warmup)``.
    """
    return peak * math.sqrt(max(1, warmup) / max(step + 1, warmup, 1))


def palm(step: int, *, peak: float = 1e-2) -> float:
    """PaLM's (Chowdhery et al. 2022, section 5): 1e-2 for 10,000 updates, then ``1 / sqrt(k)``, k = step + 1.

    Meant for Adafactor, which scales its steps with the size of a parameter. Another ``peak`` scales all of it.
    """
    return inverse_sqrt(step, peak=peak, warmup=10_000)


def wsd(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup: int = 0,
    floor: float = 0.0,
    decay: int | None = None,
    shape: Literal["linear", "sqrt", "exponential"] = "linear",
) -> float:
    """Warm-up, stable, decay (MiniCPM, Hu et al. 2024, section 4): ``peak`` until the last ``decay`` updates.

    ``decay``: default a tenth of ``steps``, what MiniCPM found enough. ``shape``: of the decay;
    ``exponential`` is MiniCPM's own, the same factor every update down to ``floor`` > 0; ``sqrt`` is
    1 - sqrt(share), which Hägele et al. (2024, section 3) found better than ``linear``.
    """
    if step < warmup:
        return _warm(step, peak, warmup)
    length = max(1, steps // 10) if decay is None else decay
    share = _share(step, max(warmup, steps - length), steps)
    if shape == "exponential":
        if not floor > 0:
            raise UserError(
                f"wsd: argument 'floor': got {floor}, expected a rate above 0 to fall to by factors"
            )
        return peak * (floor / peak) ** share
    left = 1.0 - (math.sqrt(share) if shape == "sqrt" else share)
    return floor + (peak - floor) * left


def batch_tokens(tokens: int, *, full: int, start: int = 32_000, ramp: int = 4_000_000_000) -> int:
    """Tokens of the next batch after ``tokens`` tokens: from ``start`` linearly to ``full`` at ``ramp``.

    GPT-3 (Brown et al. 2020, appendix B): from 32k tokens over the first 4 to 12 billion tokens, by model size.
    """
    if start >= full or tokens >= ramp:
        return full
    return start + (full - start) * tokens // ramp


class BatchRamp:
    """:func:`batch_tokens` in whole micro-batches of ``size`` tokens: which of them each update takes.

    The micro-batches are numbered through from 0, so what an update sees depends on its index only. The
    nearest whole number is taken, at least one; ``full`` is in micro-batches, ``start`` and ``ramp`` in tokens.
    """

    def __init__(self, size: int, full: int, start: int = 32_000, ramp: int = 4_000_000_000) -> None:
        self._size, self._full, self._start, self._ramp = size, full, start, ramp
        self._begins = array(
            "q", [0]
        )  # the first micro-batch of each update so far asked for, until the ramp ends
        self._done = False

    def micro_batches(self, step: int) -> range:
        """The numbers of the micro-batches that the update with zero-based index ``step`` takes."""
        while not self._done and len(self._begins) <= step + 1:
            begin = self._begins[-1]
            tokens = batch_tokens(
                begin * self._size, full=self._full * self._size, start=self._start, ramp=self._ramp
            )
            count = max(1, (2 * tokens + self._size) // (2 * self._size))
            if count >= self._full:
                self._done = True
            else:
                self._begins.append(begin + count)
        last = len(self._begins) - 1
        if step < last:
            return range(self._begins[step], self._begins[step + 1])
        begin = self._begins[last] + (step - last) * self._full
        return range(begin, begin + self._full)


def names() -> list[str]:
    """The schedules that :func:`get` knows."""
    return sorted(_SCHEDULES)


def get(name: str) -> Callable[..., float]:
    """A schedule by its name; an unknown one is an error with the nearest name."""
    if name not in _SCHEDULES:
        raise unknown_name("schedule", name, _SCHEDULES)
    return _SCHEDULES[name]


def _warm(step: int, peak: float, warmup: int) -> float:
    return peak * (step + 1) / (warmup + 1) if step < warmup else peak


def _share(step: int, start: int, end: int) -> float:
    """How much of ``start .. end`` is over, 0 to 1; 1 where the interval is empty."""
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else 1.0


_SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "palm": palm,
    "wsd": wsd,
}
