"""Stages that learn from comparisons, ready to run: reward models and preference policies, from files and settings."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from gptcore.align import pairs, preferences, rankings, reward_model
from gptcore.align.preference_spec import PreferenceSpec
from gptcore.align.preferences import PreferencePolicy
from gptcore.align.reward_model import RewardModel
from gptcore.align.reward_spec import RewardSpec
from gptcore.align.supervised import adapted, started
from gptcore.data import chat as chats
from gptcore.data.chat import Chat
from gptcore.data.permutation import derive, permute
from gptcore.data.record_files import read
from gptcore.data.records import Demonstration, Labelled, Ranking
from gptcore.errors import UserError
from gptcore.infer import trained
from gptcore.models import GPT
from gptcore.train import Result, TrainConfig, from_table, run
from gptcore.train.config import merge
from gptcore.train.evaluation import Batches

Item = TypeVar("Item")
_PLACE_OF_HELD_OUT = 7  # so that it draws numbers unrelated to the loaders'
_LONGEST = 512  # tokens of an answer with its prompt by default, or the model's context where that is shorter


@dataclass(frozen=True)
class Stage(Generic[Item]):
    """Settings, model with its chat, batches, what is held out, and what was left out by reason."""

    config: TrainConfig
    model: GPT
    chat: Chat
    loader: Batches
    evaluate: Callable[[torch.nn.Module], dict[str, float]]
    learnt: int
    held_out: list[Item]
    skipped: Mapping[str, int]


def prepare_reward(table: Mapping[str, Any], spec: RewardSpec, *, member: int = 0) -> Stage[rankings.Ranked]:
    """Build what the settings name, for member ``member`` of an ensemble; nothing is written.

    Args:
        table: settings of training, as TOML has them, with ``start``; ``adapter`` may be among them.

    Raises:
        UserError: no model, data that cannot be read, a tokenizer that is not the model's.
    """
    table = _table(table, "runs/reward", 5e-5, member)
    model, chat = _model(table, spec.template)
    settings = _settings(table, model)
    found = read(_files("reward", spec.files), Ranking)
    options = {"length": settings.data.length, "margin": spec.margin, "margins": spec.margins}
    learnt, rest = _divided(found.records, settings)
    ranked, left_out = rankings.tokenised(learnt, chat, **options)  # type: ignore[arg-type]
    held_out, more = rankings.tokenised(rest, chat, **options)  # type: ignore[arg-type]
    own, _ = rankings.fold_of(len(ranked), spec.folds, member, settings.seed - member)
    references = [
        chat.response(record.prompt, record.completion)
        for record in (read(spec.references, Demonstration) if spec.references else ())
    ]
    served = chat.tokenizer.fingerprint, chat.tokenizer.vocab_size
    loader = rankings.RankingLoader(
        [ranked[i] for i in own], *served, batch=settings.data.batch, seed=settings.seed
    )
    model = RewardModel.over(model, seed=settings.seed, centring=spec.centring, ties=spec.ties)
    evaluate = reward_model.evaluation(_some(held_out), references)
    config = _with_steps(table, settings, len(own), spec.epochs)
    skipped = found.skipped + collections.Counter(left_out) + collections.Counter(more)
    return Stage(config, model, chat, loader, evaluate, len(own), held_out, skipped)


def prepare_preferences(table: Mapping[str, Any], spec: PreferenceSpec) -> Stage[pairs.Preference]:
    """As :func:`prepare_reward`, for DPO and its family; the reference is asked now."""
    table = _table(table, "runs/dpo", 1e-5, 0)
    model, chat = _model(table, spec.template)
    settings = _settings(table, model)
    kind: Any = Labelled if spec.loss_type == "kto" else Ranking
    found = read(_files("preference", spec.files), kind)
    learnt, rest = _divided(found.records, settings)
    some, left_out = pairs.tokenised(learnt, chat, length=settings.data.length)
    held_out, more = pairs.tokenised(rest, chat, length=settings.data.length)
    if spec.loss_type == "kto":
        some, held_out = pairs.with_others(some), pairs.with_others(held_out)
    some, held_out = (preferences.with_reference(model, part) for part in (some, _some(held_out)))
    loader = pairs.PairLoader(
        some, chat.tokenizer.fingerprint, chat.tokenizer.vocab_size, batch=settings.data.batch, seed=settings.seed
    )  # fmt: skip
    policy = PreferencePolicy.over(model, spec)
    config = _with_steps(table, settings, len(some), spec.epochs)
    skipped = found.skipped + collections.Counter(left_out) + collections.Counter(more)
    return Stage(config, policy, chat, loader, preferences.evaluation(held_out), len(some), held_out, skipped)


def train(stage: Stage[Any], *, quiet: bool = False, writes: bool = True) -> Result:
    """Run a stage, or continue it. ``writes``: keep tokenizer and template with the run; one process does."""
    if writes:
        chats.save(stage.chat, Path(stage.config.run_dir) / trained.TOKENIZER_DIRECTORY)
    return run(
        stage.config, model=stage.model, loader=stage.loader, evaluate=stage.evaluate, tokenizer=stage.chat.tokenizer,
        measure_peak=not quiet, quiet=quiet,
    )  # fmt: skip


def _table(table: Mapping[str, Any], run_dir: str, rate: float, member: int) -> dict[str, Any]:
    defaults = {
        "run_dir": run_dir, "seed": 1337, "data": {"batch": 8},
        "optimizer": {"lr": rate, "weight_decay": 0.0}, "schedule": {"warmup": 0},
    }  # fmt: skip
    merged = merge(defaults, table)
    return {**merged, "seed": merged["seed"] + member}


def _model(table: dict[str, Any], template: str) -> tuple[GPT, Chat]:
    """The model to begin with, its adapter on, whose table leaves the others."""
    model, chat = started(table, template)
    adapted(model, table)
    table["model"] = model.config.to_dict()
    return model, chat


def _settings(table: Mapping[str, Any], model: GPT) -> TrainConfig:
    return from_table(merge({"data": {"length": min(_LONGEST, model.context_length)}}, table))


def _with_steps(table: Mapping[str, Any], settings: TrainConfig, count: int, epochs: float) -> TrainConfig:
    """With what follows from the size of the data where it was not set: steps, evaluation and checkpoint."""
    per_epoch = count / (settings.data.batch * settings.data.accumulate)
    steps = table.get("steps", max(1, math.ceil(epochs * per_epoch)))
    every = max(1, min(round(per_epoch / 4), steps))
    data = {"length": settings.data.length}
    derived = {"steps": steps, "evaluation": {"every": every}, "checkpoint": {"every": every}, "data": data}
    return from_table(merge(derived, table))


def _files(stage: str, files: Sequence[str]) -> list[str]:
    if not files:
        raise UserError(f"{stage}.files: got none, expected files of preferences")
    return list(files)


def _divided(records: Sequence[Any], settings: TrainConfig) -> tuple[list[Any], list[Any]]:
    """To learn from, and held out: the share ``data.held_out``, at least 2, in an order of the seed."""
    count = len(records)
    if count < 4:
        raise UserError(f"there are {count} preferences, expected at least 4: to learn from and to hold out")
    held_out = min(max(2, round(settings.data.held_out * count)), count - 2)
    order = permute(np.arange(count), count, derive(settings.seed, _PLACE_OF_HELD_OUT)).tolist()
    return [records[i] for i in order[held_out:]], [records[i] for i in order[:held_out]]


def _some(held_out: list[Item]) -> list[Item]:
    if not held_out:
        raise UserError("no held-out preference fits into data.length; make that longer")
    return held_out
