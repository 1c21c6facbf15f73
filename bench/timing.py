"""Timing that a neighbour on the machine cannot bias: interleaved samples, medians, quartiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# One sample lasts at least this long, so that the clock's 50 ns and a timer interrupt disappear in it.
MIN_SAMPLE_SECONDS = 1e-3
# On a GPU at least this long: draining it costs some 10 us.
MIN_DEVICE_SECONDS = 1e-2
MAX_INNER = 2000


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation between order statistics. Raises ValueError for no values."""
    if not values:
        raise ValueError("quantile: got no values, expected at least one")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Statistics:
    """median: seconds; spread: distance of the quartiles over the median, a plain number."""

    median: float
    spread: float
    repeats: int


def statistics(samples: Sequence[float]) -> Statistics:
    median = quantile(samples, 0.5)
    spread = (quantile(samples, 0.75) - quantile(samples, 0.25)) / median if median > 0 else 0.0
    return Statistics(median, spread, len(samples))


class CacheFlush:
    """Evicts the caches by writing a buffer; built on first use because it is large."""

    def __init__(self, num_bytes: int = 256 << 20, device: str = "cpu") -> None:
        self._num_bytes, self._device = num_bytes, device
        self._buffer: Any = None

    def __call__(self) -> None:
        import torch

        if self._buffer is None:
            self._buffer = torch.zeros(self._num_bytes // 4, device=self._device)
        self._buffer.add_(1.0)


def _nothing() -> None:
    pass


def time_calls(call: Callable[[], Any], count: int, synchronize: Callable[[], None] = _nothing) -> float:
    """Seconds per call over ``count`` calls in a row; a device is drained before the clock stops."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def warm_up(
    call: Callable[[], Any],
    synchronize: Callable[[], None] = _nothing,
    *,
    calls: int = 3,
    min_seconds: float = 0.05,
) -> float:
    """Call until caches, allocator and compilers have settled; returns the fastest call in seconds."""
    best, spent, done = float("inf"), 0.0, 0
    while done < calls or (spent < min_seconds and done < 50):
        seconds = time_calls(call, 1, synchronize)
        best, spent, done = min(best, seconds), spent + seconds, done + 1
    return best


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warm: Mapping[str, float],
    flush: Callable[[], None] | None = None,
    synchronize: Callable[[], None] = _nothing,
    min_seconds: float = MIN_SAMPLE_SECONDS,
) -> dict[str, list[float]]:
    """Seconds per call for each name, sampled A B A B.

    repeats: samples for each name. warm: seconds of a warm call, which sets how many calls one sample
    takes, to last min_seconds. flush: called before each sample, which then is a single call on cold
    caches. The order is rotated from round to round, so that nobody always runs after the same neighbour.
    """
    names = list(calls)
    inner = {name: 1 if flush else _inner_count(warm[name], min_seconds) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_index in range(repeats):
            shift = round_index % len(names)
            for name in names[shift:] + names[:shift]:
                if flush:
                    flush()
                samples[name].append(time_calls(calls[name], inner[name], synchronize))
    finally:
        if collecting:
            gc.enable()
    return samples


def _inner_count(seconds: float, min_seconds: float = MIN_SAMPLE_SECONDS) -> int:
    return max(1, min(MAX_INNER, round(min_seconds / max(seconds, 1e-9))))
