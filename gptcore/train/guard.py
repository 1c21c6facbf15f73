"""Detectors: which updates of a run are out of line, and what the settings want done about them.

They see one loss and one gradient norm for each update, the numbers that all ranks share, and keep only those of the
last updates. So what they decide is a function of the run, the same on every rank and after every resume.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gptcore.train.recovery_spec import RecoverySpec

# The median absolute deviation of a Gaussian is its standard deviation over this: 1 / quantile(0.75).
GAUSSIAN_MAD = 1.482602218505602
# The least standard deviation, as a share of the median: less of a rise than threshold times this is never a spike.
LEAST_SPREAD = 1e-3

# From the mildest to the gravest, when two detectors speak at once.
_GRAVITY = ("none", "warn", "skip", "rewind", "stop")


class Sighting(NamedTuple):
    """A value out of line. ``median``, ``z``: of an outlier; ``usual``: what a loss scale has fallen from."""

    detector: str
    value: float
    median: float | None = None
    z: float | None = None
    usual: float | None = None


class Verdict(NamedTuple):
    """What is to be done after an update. ``onset``: zero-based index of the first update of the spike."""

    action: str = "none"
    detector: str = ""
    onset: int = -1


class Window:
    """The last ``size`` values, for how far above them another lies: (x - median) / (1.4826 MAD).

    Half of the values may be outliers before they move median and MAD at will (Rousseeuw and Croux 1993), so outliers
    are kept like any value, and a level that has come to stay is the usual one within half a window.
    """

    def __init__(self, size: int, least: int) -> None:
        self.least = least
        self._values: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []

    def median(self) -> float:
        """Of the values, of which there must be one."""
        values, half = self._sorted, len(self._sorted) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2

    def outlier(self, detector: str, value: float, threshold: float) -> Sighting | None:
        """``value``, if more than ``threshold`` robust deviations above; None too while there are too few values."""
        if len(self._sorted) < self.least:
            return None
        median = self.median()
        floor = LEAST_SPREAD * abs(median)
        if value <= median + threshold * floor:
            return None  # whatever the spread is, which costs more than all the rest
        z = (value - median) / max(GAUSSIAN_MAD * self._mad(median), floor)
        return Sighting(detector, value, median, z) if z > threshold else None

    def _mad(self, median: float) -> float:
        distances = sorted([abs(value - median) for value in self._sorted])
        half = len(distances) // 2
        return distances[half] if len(distances) % 2 else (distances[half - 1] + distances[half]) / 2

    def add(self, value: float) -> None:
        """Take in a finite value; the oldest goes."""
        if len(self._values) == self._values.maxlen:
            del self._sorted[bisect_left(self._sorted, self._values[0])]
        self._values.append(value)
        insort(self._sorted, value)

    def state(self) -> list[float]:
        return list(self._values)

    def restore(self, values: list[float]) -> None:
        """Take over what :meth:`state` gave, the newest that fit."""
        self._values.clear()
        self._values.extend(values)
        self._sorted = sorted(self._values)


class Scales:
    """The loss scales at which the last ``size`` updates without overflow were made."""

    def __init__(self, size: int) -> None:
        self._applied: deque[tuple[int, float]] = deque(maxlen=size)

    def add(self, step: int, scale: float) -> None:
        """The update of index ``step`` did not overflow at ``scale``; the oldest goes."""
        self._applied.append((step, scale))

    def highest(self) -> tuple[int, float] | None:
        """The highest, with the last update that was made at it; None before the first."""
        return max(self._applied, key=lambda entry: (entry[1], entry[0]), default=None)

    def state(self) -> list[list[float]]:
        return [list(entry) for entry in self._applied]

    def restore(self, entries: Iterable[Sequence[float]]) -> None:
        """Take over what :meth:`state` gave, the newest that fit."""
        self._applied.clear()
        self._applied.extend((int(step), scale) for step, scale in entries)


class Guard:
    """The detectors of a run: ``look`` before an update's weights are touched, ``look_at_scale`` and ``judge`` after
    it."""

    def __init__(self, spec: RecoverySpec) -> None:
        self.spec = spec
        self.policies = {
            "non_finite": spec.non_finite, "loss": spec.loss, "grad_norm": spec.grad_norm,
            "loss_scale": spec.loss_scale,
        }  # fmt: skip
        self._windows = {
            name: Window(spec.window, spec.least)
            for name in ("loss", "grad_norm")
            if self.policies[name] != "off"
        }
        self._streaks = dict.fromkeys(self.policies, 0)  # updates out of line, up to the last
        self._skips = 0  # updates skipped, up to the last
        self.scales = Scales(spec.window)

    @property
    def decides_before(self) -> bool:
        """Whether an outlier can keep an update from being applied, so that its norm is needed first."""
        return "skip" in (self.spec.loss, self.spec.grad_norm)

    def look(self, loss: float, norm: float | None) -> list[Sighting]:
        """What is out of line in these values; changes nothing."""
        values = {"loss": loss, "grad_norm": norm}
        bad = [value for value in values.values() if value is not None and not math.isfinite(value)]
        if bad:
            return [Sighting("non_finite", bad[0])]
        found = (
            window.outlier(name, value, self.spec.threshold)
            for name, window in self._windows.items()
            if (value := values[name]) is not None
        )
        return [sighting for sighting in found if sighting is not None]

    def look_at_scale(self, step: int, used: float, following: float, overflowed: bool) -> list[Sighting]:
        """Whether the loss scale has collapsed with the update of index ``step``, made at ``used``: takes that in.

        Overflows at a scale that the run has never been able to use, as when it begins too high, are none.
        """
        if not overflowed:
            self.scales.add(step, used)
        highest = self.scales.highest()
        if highest is None or self.policies["loss_scale"] == "off":
            return []
        usual = highest[1]
        fallen = following * self.spec.scale_fall <= usual
        return [Sighting("loss_scale", following, usual=usual)] if fallen else []

    def skips(self, seen: list[Sighting]) -> bool:
        """Whether an update with these sightings is not to be applied."""
        return self._skips < self.spec.max_skips and any(self.policies[s.detector] == "skip" for s in seen)

    def judge(self, step: int, loss: float, norm: float | None, seen: list[Sighting]) -> Verdict:
        """What to do after the update of index ``step``, of which all sightings are ``seen``; takes its values in."""
        named = {sighting.detector for sighting in seen}
        for name in self._streaks:
            self._streaks[name] = self._streaks[name] + 1 if name in named else 0
        verdicts = [self._verdict(step, sighting, self.skips(seen)) for sighting in seen]
        self._skips = self._skips + 1 if self.skips(seen) else 0
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if name in self._windows and value is not None and math.isfinite(value):
                self._windows[name].add(value)
        return max(verdicts, key=lambda verdict: _GRAVITY.index(verdict.action), default=Verdict())

    def _verdict(self, step: int, sighting: Sighting, skipped: bool) -> Verdict:
        name = sighting.detector
        policy, streak = self.policies[name], self._streaks[name]
        onset = step + 1 - streak
        if policy == "skip":
            return Verdict("skip" if skipped else "rewind", name, onset)
        if name == "loss_scale":
            highest = self.scales.highest()
            assert highest is not None
            onset = highest[0] + 1
        # An outlier once, however long it lasts.
        due = streak == self._patience(name) or name == "non_finite"
        return Verdict(policy, name, onset) if due else Verdict("none", name, onset)

    def news(self, sighting: Sighting) -> bool:
        """Whether a sighting that ``judge`` has taken in says more than that the spike goes on."""
        name = sighting.detector
        return self.policies[name] == "skip" or self._streaks[name] <= self._patience(name)

    def _patience(self, name: str) -> int:
        """Sightings in a row that make a spike: a scale that has fallen so far took many updates for it."""
        return 1 if name == "loss_scale" else self.spec.patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON."""
        windows = {name: window.state() for name, window in self._windows.items()}
        return {
            "windows": windows, "streaks": dict(self._streaks), "skips": self._skips, "scales": self.scales.state(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, whatever of it this guard's settings still watch."""
        for name, window in self._windows.items():
            window.restore(state["windows"].get(name, []))
        self._streaks.update({name: n for name, n in state["streaks"].items() if name in self._streaks})
        self._skips = state["skips"]
        self.scales.restore(state.get("scales", ()))
