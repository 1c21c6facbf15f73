"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no schedule state.

``step`` is the zero-based index of the update about to be made. Every schedule but the inverse square
root warms up linearly: update ``s < warmup`` gets ``peak * (s + 1) / (warmup + 1)``, so that no update is
wasted on rate zero and the peak is reached exactly at ``step == warmup``. ``floor`` is the rate at the
end (a rate, not a share of the peak) and what later steps keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from gptcore.errors import unknown_name


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
    """``peak`` for ``warmup`` updates, then ``peak * sqrt(warmup / (step + 1))`` (T5, PaLM section 5)."""
    return peak * math.sqrt(max(1, warmup) / max(step + 1, warmup, 1))


def wsd(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup: int = 0,
    floor: float = 0.0,
    decay: int | None = None,
    shape: Literal["linear", "sqrt"] = "linear",
) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): ``peak`` until the last ``decay`` updates.

    ``decay``: default a tenth of ``steps``. ``shape``: of the decay; ``sqrt`` is 1 - sqrt(share), which
    Hägele et al. (2024) found better.
    """
    if step < warmup:
        return _warm(step, peak, warmup)
    length = max(1, steps // 10) if decay is None else decay
    share = _share(step, max(warmup, steps - length), steps)
    left = 1.0 - (math.sqrt(share) if shape == "sqrt" else share)
    return floor + (peak - floor) * left


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
    "wsd": wsd,
}
