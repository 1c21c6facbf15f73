"""The report of runs: what their metrics files hold, whatever kind of training wrote them.

A metrics line has ``kind`` and ``step``; every other field that is a number becomes a curve. Fields ``NAME_low`` and
``NAME_high`` beside ``NAME`` are the bounds of its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptcore.errors import UserError
from gptcore.report import gold_and_proxy, plot
from gptcore.report.html import Page, cell

Lines = Sequence[Mapping[str, Any]]

_BOUNDS = ("_low", "_high")
# what a reader looks for first; the rest follows by name
_FIRST = (
    "reward", "score", "accuracy", "exact_match", "win_rate", "val_loss", "loss", "kl", "entropy", "clip_share",
    "val_bits_per_byte", "lr", "grad_norm",
)  # fmt: skip
_COUNTERS = {
    "tokens",
    "seconds",
    "episodes",
    "step",
}  # rise by themselves: in the summary, not among the curves
_SAMPLES = 5


def page(
    title: str, runs: Mapping[str, Lines], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> Page:
    """A page of one or several runs: last values side by side, curves over one another, samples, warnings, settings.

    Args:
        title: of the page.
        runs: the lines of each run's metrics, by the run's name.
        settings: of each run.

    Raises:
        UserError: a run without a single line.
    """
    for name, lines in runs.items():
        if not lines:
            raise UserError(f"{name} has no metrics yet: nothing to report")
    made = Page(
        title, subtitle=", ".join(f"{name}: {_last_step(lines)} updates" for name, lines in runs.items())
    )
    kinds = sorted({line["kind"] for lines in runs.values() for line in lines}, key=_kind_order)
    numeric = {kind: names for kind in kinds if (names := _names(runs, kind))}
    if numeric:
        made.section("Last values")
        made.table(["", *runs], _last_values(runs, numeric))
    for kind, names in numeric.items():
        curves = [panel for name in names if (panel := _panel(runs, kind, name)) is not None]
        if curves:
            made.section(kind.capitalize())
            made.panels(curves, x_label="update", caption=f"{kind}, over the updates")
    if over := gold_and_proxy.panels(runs):
        made.section("Gold and proxy reward")
        made.panels(over, x_label=gold_and_proxy.X_LABEL, caption=gold_and_proxy.CAPTION)
    _texts(made, runs, "sample", "Samples", _SAMPLES)
    _texts(made, runs, "warning", "Warnings", 50)
    if settings:
        made.section("Settings")
        for name, values in settings.items():
            made.text(name)
            made.settings(values)
    return made


def _names(runs: Mapping[str, Lines], kind: str) -> list[str]:
    """Fields of ``kind`` that are numbers somewhere, bounds left to what they bound."""
    found = {
        name
        for lines in runs.values()
        for line in lines
        if line["kind"] == kind
        for name, value in line.items()
        if _is_number(value)
    } - {"step"}
    bounds = {name + end for name in found for end in _BOUNDS}
    return sorted(found - bounds, key=lambda name: (_place(name), name))


def _place(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _kind_order(kind: str) -> tuple[bool, str]:
    return kind != "evaluation", kind


def _points(lines: Lines, kind: str, name: str) -> list[tuple[float, float]]:
    return [
        (line["step"], line[name]) for line in lines if line["kind"] == kind and _is_number(line.get(name))
    ]


def _panel(runs: Mapping[str, Lines], kind: str, name: str) -> plot.Panel | None:
    """The curve of a field in every run; None where there is nothing to see: a counter, a constant, a single point."""
    series = []
    for run, lines in runs.items():
        points = _points(lines, kind, name)
        low, high = (dict(_points(lines, kind, name + end)) for end in _BOUNDS)
        bounded = bool(points) and all(x in low and x in high for x, _ in points)
        series.append(plot.Series(run, points, [(low[x], high[x]) for x, _ in points] if bounded else None))
    values = {y for one in series for _, y in one.points}
    if name in _COUNTERS or len(values) < 2:
        return None
    return plot.Panel(name, [one for one in series if one.points])


def _last_values(runs: Mapping[str, Lines], numeric: Mapping[str, Sequence[str]]) -> list[list[Any]]:
    rows = []
    for kind, names in numeric.items():
        for name in names:
            rows.append([f"{kind}: {name}", *(_last(lines, kind, name) for lines in runs.values())])
    return rows


def _last(lines: Lines, kind: str, name: str) -> Any:
    for line in reversed(lines):
        if line["kind"] == kind and _is_number(line.get(name)):
            bounds = [line.get(name + end) for end in _BOUNDS]
            return (line[name], *bounds) if all(map(_is_number, bounds)) else line[name]
    return None


def _texts(made: Page, runs: Mapping[str, Lines], kind: str, title: str, limit: int) -> None:
    """The last texts of a kind, of each run."""
    chosen = [
        (name, line) for name, lines in runs.items()
        for line in [x for x in lines if x["kind"] == kind and isinstance(x.get("text"), str)][-limit:]
    ]  # fmt: skip
    if chosen:
        made.section(title)
    for name, line in chosen:
        numbers = [
            f"{key} {cell(value)}" for key, value in line.items() if key != "step" and _is_number(value)
        ]
        prompt = line.get("prompt")
        text = f"{prompt}{line['text']}" if isinstance(prompt, str) else line["text"]
        made.sample(text, ", ".join([name, f"update {line['step']}", *numbers]))


def _last_step(lines: Lines) -> int:
    return max(line["step"] for line in lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
