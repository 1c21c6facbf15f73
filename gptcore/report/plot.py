"""Plots of a run, drawn without a display."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_TRAIN, _HELD_OUT = "#4c72b0", "#c44e52"  # told apart by the colour-blind too: they differ in lightness


def loss_curve(
    path: str | os.PathLike[str],
    train: Sequence[tuple[int, float | None]],
    held_out: Sequence[tuple[int, float | None]] = (),
    *,
    title: str = "",
) -> Path | None:
    """Draws training and held-out loss (nats per token) over the updates into a PNG of 1200 x 750 pixels.

    The points of ``train`` are drawn thin, and their mean over a fiftieth of the run around each on top.
    Returns the path, or None when there is nothing to draw. None values (a loss that was not finite) are
    left out.

    Raises:
        OSError: the file cannot be written.
    """
    train_points = [(step, loss) for step, loss in train if loss is not None]
    held_points = [(step, loss) for step, loss in held_out if loss is not None]
    if not train_points and not held_points:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot: no global state, no display, no backend switched under the user.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train_points:
        steps = [step for step, _ in train_points]
        losses = [loss for _, loss in train_points]
        mean = running_mean(losses, len(losses) // 100)
        axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(steps, mean, color=_TRAIN, linewidth=1.8, label=f"training, {mean[-1]:.3f}")
    if held_points:
        axes.plot(
            [step for step, _ in held_points], [loss for _, loss in held_points], "o-", color=_HELD_OUT,
            markersize=4, linewidth=1.8, label=f"held out, {held_points[-1][1]:.3f}",
        )  # fmt: skip
    axes.set_xlabel("update")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = Path(path)
    figure.savefig(path, format="png")
    return path


# key of a metrics line's routing, label of its axis
_ROUTING = (
    ("drop_rate", "share of choices\ndropped"),
    ("load", "load, maximum\nover mean"),
    ("entropy", "entropy of the\nrouter (nats)"),
)


def routing_curves(
    path: str | os.PathLike[str], lines: Sequence[tuple[int, Mapping[str, Any]]], *, title: str = ""
) -> Path | None:
    """Draws drop rate, load and entropy over the updates, a line for each layer of experts, into a PNG.

    ``lines``: step and the ``routing`` of its metrics line. Returns the path, or None when there is nothing to draw.

    Raises:
        OSError: the file cannot be written.
    """
    if not lines:
        return None
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(_ROUTING), sharex=True)
    layers, steps = lines[-1][1]["layers"], [step for step, _ in lines]
    shades = colormaps["viridis"]  # from dark to light with depth, in print too
    for axes, (key, label) in zip(panels, _ROUTING, strict=True):
        for place, layer in enumerate(layers):
            mean = running_mean([routing[key][place] for _, routing in lines], len(lines) // 100)
            shade = shades(place / max(1, len(layers) - 1) * 0.9)
            axes.plot(steps, mean, color=shade, linewidth=1.2, label=f"block {layer}, {mean[-1]:.3f}")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        if len(layers) <= 8:
            axes.legend(frameon=False, fontsize="small", ncols=2)
    panels[0].set_title(title)
    panels[-1].set_xlabel("update")
    path = Path(path)
    figure.savefig(path, format="png")
    return path


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """The mean of each value with up to ``half`` before and ``half`` after it: centred, so it does not lag."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    return means


# told apart by the colour-blind too (Okabe and Ito 2008), the strongest first
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


class Series(NamedTuple):
    """A named line: points (x, y) in order, and bounds (low, high) of each where it has an interval. ``dots``: points
    alone, without a line between them."""

    name: str
    points: Sequence[tuple[float, float]]
    bounds: Sequence[tuple[float, float]] | None = None
    dots: bool = False


class Panel(NamedTuple):
    """One plot of a figure: its title, and the lines in it."""

    title: str
    series: Sequence[Series]


def panels(all_of: Sequence[Panel], *, x_label: str = "", columns: int = 2) -> bytes:
    """Small plots side by side, as the bytes of a PNG. Of more than 200 points a running mean is drawn over them.

    Raises ValueError where there is nothing to draw.
    """
    if not any(series.points for panel in all_of for series in panel.series):
        raise ValueError("panels: nothing to draw")
    columns = min(columns, len(all_of))
    rows = -(-len(all_of) // columns)
    figure = _figure(5.2 * columns, 3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(all_of):
            axes.set_visible(False)
            continue
        panel = all_of[place]
        for colour, series in zip(itertools.cycle(_COLOURS), panel.series, strict=False):
            _line(axes, series, colour)
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
        if place + columns >= len(all_of):
            axes.set_xlabel(x_label)
        if len(panel.series) > 1:
            axes.legend(frameon=False, fontsize="small")
    return _png(figure)


def intervals(
    rows: Sequence[tuple[str, float, float, float]], *, label: str = "", reference: float | None = None
) -> bytes:
    """Estimates with their intervals, one below the other, as the bytes of a PNG: (name, estimate, low, high).

    ``reference``: a line to compare with, such as a win rate of one half. Raises ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("intervals: nothing to draw")
    figure = _figure(7.5, 0.8 + 0.34 * len(rows))
    axes = figure.add_subplot()
    places = range(len(rows), 0, -1)
    for place, (_, estimate, low, high) in zip(places, rows, strict=True):
        axes.plot([low, high], [place, place], color=_COLOURS[0], linewidth=2)
        axes.plot([estimate], [place], "o", color=_COLOURS[0], markersize=5)
    if reference is not None:
        axes.axvline(reference, color="#777777", linewidth=1, linestyle="--")
    axes.set_yticks(list(places), [row[0] for row in rows])
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.set_xlabel(label)
    axes.grid(alpha=0.3, axis="x")
    return _png(figure)


def _line(axes: Any, series: Series, colour: str) -> None:
    xs, ys = [x for x, _ in series.points], [y for _, y in series.points]
    if series.bounds is not None:
        low, high = [low for low, _ in series.bounds], [high for _, high in series.bounds]
        axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    if series.dots:
        axes.plot(xs, ys, "o", color=colour, markersize=5, label=series.name)
        return
    if len(ys) > 200:
        axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
        ys = running_mean(ys, len(ys) // 100)
    axes.plot(
        xs, ys, "o-" if len(ys) < 30 else "-", color=colour, markersize=3, linewidth=1.5, label=series.name
    )


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})  # the same bytes on every run
    return target.getvalue()
