"""Roofline pictures: each case of a suite at its flops per byte and the flop/s it reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import Results
from bench.machine import Ceilings

COLOURS = {"float32": "#3b6fb6", "bfloat16": "#c1553b"}


def plot_all(results: Results, directory: str) -> list[Path]:
    """One PNG for each suite that has records with flops and bytes; returns their paths.

    Roofs are those of the first machine in the results. Raises ValueError where there is nothing to draw.
    """
    if not results.machines:
        raise ValueError("--plot: the results name no machine, so there is no roof to draw")
    ceilings = Ceilings.from_json(results.machines[0]["ceilings"])
    by_suite: dict[str, list[Mapping[str, Any]]] = {}
    for record in results.records:
        if record.get("flops") and record.get("bytes"):
            by_suite.setdefault(record["case"].split("/")[0], []).append(record)
    if not by_suite:
        raise ValueError("--plot: no record has both flops and bytes")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    return [_plot_suite(suite, records, ceilings, folder) for suite, records in by_suite.items()]


def _plot_suite(suite: str, records: Sequence[Mapping[str, Any]], ceilings: Ceilings, folder: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    intensities = [record["flops"] / record["bytes"] for record in records]
    low, high = min(intensities) / 4, max(intensities) * 4
    _draw_roofs(axes, ceilings, low, high)
    for record, intensity in zip(records, intensities, strict=True):
        _draw_record(axes, record, intensity)
    axes.set(
        xscale="log", yscale="log", xlim=(low, high), xlabel="flop / byte", ylabel="GFLOP/s", title=suite
    )
    axes.grid(True, which="major", alpha=0.3)
    handles = [
        plt.Line2D([], [], color=c, marker="o", ls="", label=f"gptcore {d}") for d, c in COLOURS.items()
    ]
    handles.append(plt.Line2D([], [], color="grey", marker="x", ls="", label="best peer"))
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    path = folder / f"roofline_{suite}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_roofs(axes: Any, ceilings: Ceilings, low: float, high: float) -> None:
    """A roof for memory and one for cache under the flat ceiling of each dtype."""
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    copy = ceilings.bandwidth["copy"]
    for dtype, peak in ceilings.peak.items():
        for (_, rate), style in ((copy[-1], "-"), (copy[0], ":")):
            axes.plot(grid, [min(peak, rate * x) / 1e9 for x in grid], style, color=COLOURS[dtype], lw=1)
    axes.plot([], [], "k-", lw=1, label="memory")


def _draw_record(axes: Any, record: Mapping[str, Any], intensity: float) -> None:
    reached = record["flops"] / record["gptcore_ms"] / 1e6
    axes.plot(intensity, reached, "o", color=COLOURS[record["dtype"]], ms=5)
    best = record.get("best_peer")
    if best:
        axes.plot(intensity, record["flops"] / record["peers"][best] / 1e6, "x", color="grey", ms=5)
    label = record["case"].split("/", 1)[1]
    axes.annotate(label, (intensity, reached), fontsize=5, xytext=(4, 2), textcoords="offset points")
