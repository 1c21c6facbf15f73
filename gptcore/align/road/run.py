"""The road from the first stage to the report: what has ended is not run again, what was stopped goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptcore.align import reward_model
from gptcore.align.claim import claim
from gptcore.align.road import stages
from gptcore.align.road.report import Report, build
from gptcore.align.road.settings import RoadSpec
from gptcore.align.road.stages import Road
from gptcore.data.atomic import write_text
from gptcore.report.progress import format_duration

_RESULT = "result.json"

Say = Callable[[str], None]


def run(
    directory: str | os.PathLike[str], spec: RoadSpec, *, quiet: bool = False, say: Say = print
) -> Report:
    """Walk the whole road in ``directory``, or what is left of it, and write ``report.html`` there.

    The same settings give the same report. ``say`` gets a line for each stage, with the time that remains.

    Raises:
        UserError: a directory that holds something else, or a road with other settings.
        SystemExit: after SIGINT or SIGTERM, with 128 + signal; the same call goes on from there.
    """
    place = Path(directory)
    claim(place, spec, "road")
    road, clock = Road(place, spec, quiet), _Clock(spec, say)
    done: dict[str, Any] = {}

    def stage(name: str, work: Callable[[], dict[str, Any]]) -> None:
        done[name] = _ended(place / name) or _walked(place / name, work, clock.begins(name))
        clock.ended(name)

    def with_measures(
        stage_of_model: str, work: Callable[[], dict[str, Any]]
    ) -> Callable[[], dict[str, Any]]:
        def both() -> dict[str, Any]:
            result = work()
            model = road.model(result.get("stage", stage_of_model))
            return {**result, "right": stages.measured(road, model)}

        return both

    stage("pretrain", lambda: stages.pretrain(road))
    stage("sft", with_measures("sft", lambda: stages.fine_tune(road)))
    stage("reward", lambda: stages.train_reward_model(road))
    reward, _ = reward_model.load(place / "reward")
    chosen = "best-of"
    stage(chosen, lambda: {"right": stages.best_of(road, road.model("sft"), reward, spec.best_of)})
    stage("ppo", with_measures("ppo", lambda: stages.reinforce(road, reward)))
    spent = done["reward"]["tokens"], done["ppo"]["tokens"]
    stage("more_sft", with_measures("more_sft", lambda: stages.more_imitation(road, *spent)))
    stage("expert", with_measures("expert", lambda: stages.iterate_expert(road)))
    report = build(spec, done)
    report.write(place)
    return report


def _ended(place: Path) -> dict[str, Any] | None:
    path = place / _RESULT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _walked(place: Path, work: Callable[[], dict[str, Any]], began: float) -> dict[str, Any]:
    result = {**work(), "stage_seconds": time.monotonic() - began}
    place.mkdir(exist_ok=True)
    write_text(place / _RESULT, json.dumps(result) + "\n")
    return result


class _Clock:
    """Says which stage begins and how long the rest takes, from the operations of each and the time so far."""

    def __init__(self, spec: RoadSpec, say: Say) -> None:
        self._say = say
        self._began = time.monotonic()
        self._at = self._began
        self._done = 0.0
        self._seconds = 0.0
        update = spec.batch * spec.length * 6.0
        reward = stages.tokens_of_rankings(spec) * 6.0
        ppo = spec.ppo_iterations * spec.episodes * 19.0 * (8.0 + 6.0 * spec.epochs)
        answer = 19.0 * 20.0  # sampling has a price for each step that few rows share
        self._costs = {
            "pretrain": update * spec.pretrain_steps,
            "sft": update * spec.sft_steps,
            "reward": reward + spec.ranked_prompts * spec.k * answer,
            "best-of": spec.held_out * spec.best_of * answer,
            "ppo": ppo,
            "more_sft": reward + ppo,
            "expert": spec.expert_rounds
            * (spec.expert_prompts * spec.expert_samples * answer + update * (spec.sft_steps // 8)),
        }

    def begins(self, name: str) -> float:
        """Say so; returns the time."""
        self._at = time.monotonic()
        number = list(self._costs).index(name) + 1
        left = ""
        if self._done:
            ahead = sum(list(self._costs.values())[number - 1 :])
            left = f", about {format_duration(self._seconds * ahead / self._done)} left"
        self._say(f"stage {number} of {len(self._costs)}: {name}{left}")
        return self._at

    def ended(self, name: str) -> None:
        """Learn from what it took; of a stage that had ended before, nothing."""
        spent = time.monotonic() - self._at
        if spent > 0.5:
            self._done += self._costs[name]
            self._seconds += spent
        self._at = time.monotonic()
