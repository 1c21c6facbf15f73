"""What the road came to: held-out accuracy of every stage with intervals, tests against both controls, curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcore.align.road.settings import RoadSpec
from gptcore.data.atomic import write_text
from gptcore.report import gold_and_proxy
from gptcore.report.html import Page
from gptcore.stats.intervals import Interval, wilson
from gptcore.stats.significance import mcnemar

NAMES = {
    "sft": "fine-tuned (SFT)",
    "more_sft": "SFT, as much compute more",
    "best-of": "best of {best_of} of SFT by the reward model",
    "ppo": "PPO on the reward model",
    "expert": "expert iteration on the verifier",
}


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
            greedy = "" if row.greedy is None else row.greedy.percent()
            found.append(f"{row.name:{width}}  {greedy:>20}  {row.sampled.percent():>20}  {row.seconds:7.0f}")
        found += ["", f"reward model: {self.pair_accuracy.percent()} of noisy pairs in order"]
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
        """``report.json``, and ``report.html`` with everything in one file, in ``directory``."""
        write_text(directory / "report.json", json.dumps(self.to_dict(), indent=1) + "\n")
        self.page().write(directory / "report.html")

    def page(self) -> Page:
        """The report with plots: accuracies, tests, the reward model, gold and proxy reward over the square root of KL
        (Gao et al. 2023)."""
        page = Page(
            "From pretraining to PPO", subtitle=f"additions with the working shown, seed {self.spec.seed}"
        )
        page.section("Held-out exact match")
        page.text(f"Over {self.spec.held_out} prompts never seen, with 95% Wilson intervals.")
        for way in ("greedy", "sampled"):
            rows = [(row.name, *getattr(row, way)) for row in self.rows if getattr(row, way) is not None]
            page.intervals(rows, label="greedy" if way == "greedy" else "at temperature 1")
        page.table(["stage", "seconds"], [[row.name, row.seconds] for row in self.rows])
        page.section("PPO against what it has to beat")
        page.table(["exact McNemar test, two-sided", "p"], list(self.tests.items()))
        page.section("The reward model")
        page.text(f"It orders {self.pair_accuracy.percent('%')} of pairs kept back as their noisy labels do.")
        page.panels(
            gold_and_proxy.panels({"PPO": self.curve}),
            x_label=gold_and_proxy.X_LABEL,
            caption=gold_and_proxy.CAPTION,
        )
        page.settings(self.spec.to_dict())
        return page


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
