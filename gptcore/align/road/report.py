"""What the road came to: held-out accuracy of every stage with intervals, tests against both controls, curves."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcore.align.road.settings import RoadSpec
from gptcore.data.atomic import write_text
from gptcore.stats.intervals import Interval, wilson
from gptcore.stats.significance import mcnemar

NAMES = {
    "sft": "fine-tuned (SFT)",
    "more_sft": "SFT, as much compute more",
    "best-of": "best of {best_of} of SFT by the reward model",
    "ppo": "PPO on the reward model",
    "expert": "expert iteration on the verifier",
}

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>The road: report</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }}
td, th {{ text-align: left; padding: .2em 1em .2em 0; border-bottom: 1px solid #ccc }}
img {{ max-width: 100% }}
</style>
<h1>From pretraining to PPO</h1>
<p>Exact match over {count} held-out prompts, in percent, with 95% Wilson intervals.</p>
<table>
{rows}
</table>
<h2>PPO against what it has to beat</h2>
<p>Exact McNemar tests, two-sided.</p>
<ul>
{tests}
</ul>
<h2>The reward model</h2>
<p>Orders {accuracy} % of pairs kept back as their labels do, which are noisy themselves.</p>
<p><img alt="gold and proxy reward over the square root of KL" src="data:image/png;base64,{picture}"></p>
<h2>Settings</h2>
<table>
{settings}
</table>
"""


@dataclass(frozen=True)
class Row:
    """A stage's held-out accuracy; ``greedy`` None where it does not apply. ``seconds``: what the stage took."""

    stage: str
    name: str
    greedy: Interval | None
    sampled: Interval
    seconds: float


@dataclass(frozen=True)
class Report:
    """Rows of stages; ``tests``: exact McNemar p-values of PPO against SFT and its control, two-sided.

    ``curve``: KL from the SFT model, proxy and gold reward of each iteration of PPO. ``pair_accuracy``: of the reward
    model on rankings kept back, whose labels have the noise of all.
    """

    spec: RoadSpec
    rows: tuple[Row, ...]
    tests: Mapping[str, float]
    curve: tuple[Mapping[str, float], ...]
    pair_accuracy: Interval
    extra: Mapping[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in words."""
        found = [f"held-out exact match over {self.spec.held_out} prompts, with 95% intervals", ""]
        width = max(len(row.name) for row in self.rows)
        found.append(f"{'':{width}}  {'greedy':>20}  {'at temperature 1':>20}  seconds")
        for row in self.rows:
            greedy = "" if row.greedy is None else _percent(row.greedy)
            found.append(f"{row.name:{width}}  {greedy:>20}  {_percent(row.sampled):>20}  {row.seconds:7.0f}")
        found += ["", f"reward model: {_percent(self.pair_accuracy)} of noisy pairs in order"]
        found += [f"PPO against {name}: p = {value:.2g} (McNemar)" for name, value in self.tests.items()]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON."""
        return {
            "spec": self.spec.to_dict(),
            "rows": [
                {
                    "stage": row.stage, "name": row.name, "seconds": row.seconds,
                    "greedy": None if row.greedy is None else list(row.greedy), "sampled": list(row.sampled),
                }
                for row in self.rows
            ],
            "tests": dict(self.tests), "pair_accuracy": list(self.pair_accuracy), "curve": list(self.curve),
            **self.extra,
        }  # fmt: skip

    def write(self, directory: Path) -> None:
        """``report.json``, ``curve.png``, and ``report.html`` with everything in one file, in ``directory``."""
        write_text(directory / "report.json", json.dumps(self.to_dict(), indent=1) + "\n")
        draw(directory / "curve.png", self)
        write_text(directory / "report.html", self.html((directory / "curve.png").read_bytes()))

    def html(self, picture: bytes) -> str:
        """The report as one page that needs nothing beside it; ``picture``: the curve as PNG."""
        head = "<tr><th>model<th>greedy<th>at temperature 1<th>seconds"
        rows = [
            f"<tr><td>{html.escape(row.name)}<td>{'' if row.greedy is None else _percent(row.greedy)}"
            f"<td>{_percent(row.sampled)}<td>{row.seconds:.0f}"
            for row in self.rows
        ]
        tests = [f"<li>{html.escape(name)}: p = {value:.2g}" for name, value in self.tests.items()]
        settings = [f"<tr><td>{name}<td>{value}" for name, value in self.spec.to_dict().items()]
        return _PAGE.format(
            count=self.spec.held_out, rows="\n".join([head, *rows]), tests="\n".join(tests),
            accuracy=_percent(self.pair_accuracy), settings="\n".join(settings),
            picture=base64.b64encode(picture).decode(),
        )  # fmt: skip


def build(spec: RoadSpec, done: Mapping[str, Mapping[str, Any]]) -> Report:
    """The report of the results of all stages."""
    rows = []
    for stage, name in NAMES.items():
        right, seconds = done[stage]["right"], float(done[stage]["stage_seconds"])
        title = name.format(best_of=spec.best_of)
        if isinstance(right, list):
            rows.append(Row(stage, title, None, wilson(sum(right), len(right)), seconds))
        else:
            greedy, sampled = (wilson(sum(right[k]), len(right[k])) for k in ("greedy", "sampled"))
            rows.append(Row(stage, title, greedy, sampled, seconds))
    ppo = done["ppo"]["right"]
    tests = {
        f"{label}, {way}": mcnemar(ppo[way], done[stage]["right"][way])
        for stage, label in (("sft", "SFT"), ("more_sft", "more SFT"))
        for way in ("greedy", "sampled")
    }
    reward = done["reward"]
    accuracy = wilson(reward["pair_accuracy"] * reward["pairs"], reward["pairs"])
    extra = {"more_sft_steps": done["more_sft"]["steps"], "expert_kept": done["expert"]["kept"]}
    return Report(spec, tuple(rows), tests, tuple(done["ppo"]["curve"]), accuracy, extra)


def draw(path: Path, report: Report) -> None:
    """Gold and proxy reward over the square root of the KL divergence (Gao et al. 2023), as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    right = left.twinx()
    distance = [math.sqrt(max(point["kl"], 0.0)) for point in report.curve]
    left.plot(
        distance, [point["gold"] for point in report.curve], "o-", color="#4c72b0", markersize=3, label="gold"
    )
    right.plot(
        distance,
        [point["proxy"] for point in report.curve],
        "s--",
        color="#c44e52",
        markersize=3,
        label="proxy",
    )
    left.set_xlabel("square root of KL(policy ‖ SFT), nats an answer")
    left.set_ylabel("gold: share of right answers")
    right.set_ylabel("proxy: the reward model's score")
    left.grid(alpha=0.3)
    handles = [line for axes in (left, right) for line in axes.get_lines()]
    left.legend(handles, [str(line.get_label()) for line in handles], frameon=False)
    figure.savefig(path, format="png")


def _percent(found: Interval) -> str:
    return f"{100 * found.estimate:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
