"""Plots of a run, drawn without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
