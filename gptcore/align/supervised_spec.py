"""The settings of supervised fine-tuning: the table ``[sft]``, and what it makes of those of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from gptcore.errors import UserError
from gptcore.models.schema import Spec, at_least
from gptcore.train import TrainConfig, from_table
from gptcore.train.config import merge


@dataclass(frozen=True)
class TaskSpec(Spec):
    """One task of a mixture.

    ``files``: of its demonstrations. ``weight``: of its share; by default as its examples, of which at most
    ``sft.mixture_cap`` count. ``chain_of_thought``: its answers reason. ``format``, ``fields``: as
    ``gptcore.data.record_files.read`` takes them.
    """

    section: ClassVar[str] = "sft.tasks"

    name: str = ""
    files: str | tuple[str, ...] = ()
    weight: float | None = None
    chain_of_thought: bool = False
    format: str = "auto"
    fields: dict = field(default_factory=dict)  # type: ignore[type-arg]

    def validate(self) -> None:
        if not self.name or not self.files:
            raise UserError("sft.tasks: expected a name and files for each task")
        if self.weight is not None and not 0.0 < self.weight < math.inf:
            raise UserError(f"sft.tasks.weight: got {self.weight} for {self.name}, expected above 0")


@dataclass(frozen=True)
class SFTSpec(Spec):
    """What is learnt, and how.

    ``files``: of demonstrations, in any format of ``gptcore.data.conversation_formats``; or ``tasks``, mixed by their
    weights. ``held_out_files`` are evaluated on, otherwise ``data.held_out`` of each task. ``template``: "chatml",
    "plain", "none", a Jinja file, a model's directory; "auto" is that of the model at ``start``, or else "chatml".
    ``turns``: learn all of the assistant's turns or the last. ``packing``: several examples to a row.

    ``overflow``, of an example longer than ``data.length``: refuse all, skip it, truncate its end, the stop token too,
    or truncate the beginning of its prompt. ``bad``, of a row that cannot be learnt from: refuse all, or skip it.

    ``epochs``: passes over the data, where ``steps`` is not set. ``warmup_share``: of the steps, where
    ``schedule.warmup`` is not set. ``neftune_alpha``: of the noise on embeddings (5 in the paper; 0: none).
    ``mixture_cap``: at most so many examples of a task count for its share (FLAN: 3,000; 0: all).
    ``chain_of_thought``: the share of the tasks that reason; by default what their weights give. ``answers``: so many
    held-out prompts are answered at each evaluation, which gives ``exact_match``, and with ``reward_model``, a run of
    ``gptcore reward``, ``reward``; ``answer_tokens``: of an answer.
    """

    section: ClassVar[str] = "sft"

    files: str | tuple[str, ...] = ()
    tasks: tuple[TaskSpec, ...] = ()
    held_out_files: str | tuple[str, ...] = ()
    format: str = "auto"
    fields: dict = field(default_factory=dict)  # type: ignore[type-arg]
    template: str = "auto"
    turns: Literal["all", "last"] = "all"
    packing: bool = True
    overflow: Literal["refuse", "skip", "truncate", "truncate_prompt"] = "refuse"
    bad: Literal["refuse", "skip"] = "refuse"
    epochs: float = 3.0
    warmup_share: float = 0.03
    neftune_alpha: float = 0.0
    mixture_cap: int = 0
    chain_of_thought: float | None = None
    answers: int = 0
    answer_tokens: int = 256
    reward_model: str = ""

    def validate(self) -> None:
        at_least("sft.", 0, answers=self.answers)
        at_least("sft.", 1, answer_tokens=self.answer_tokens)
        at_least("sft.", 0, warmup_share=self.warmup_share, neftune_alpha=self.neftune_alpha)
        at_least("sft.", 0, mixture_cap=self.mixture_cap)
        if not 0.0 < self.epochs < math.inf:
            raise UserError(f"sft.epochs: got {self.epochs}, expected above 0")
        if self.chain_of_thought is not None and not 0.0 < self.chain_of_thought < 1.0:
            raise UserError(
                f"sft.chain_of_thought: got {self.chain_of_thought}, expected above 0 and below 1"
            )
        if self.reward_model and not self.answers:
            raise UserError(
                "sft.reward_model: judges answers; set sft.answers, the number of held-out prompts to answer"
            )
        if self.files and self.tasks:
            raise UserError(
                "sft.files and sft.tasks: got both, expected the files of one task or a list of tasks"
            )
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise UserError(f"sft.tasks: got names {', '.join(names)}, expected each once")

    @property
    def all_tasks(self) -> tuple[TaskSpec, ...]:
        """Those of the mixture; the one of ``files`` has the name "demonstrations"."""
        if self.tasks or not self.files:
            return self.tasks
        one = {"name": "demonstrations", "files": self.files, "format": self.format, "fields": self.fields}
        return (TaskSpec.from_dict(one),)


# Where fine-tuning wants something else than pretraining.
DEFAULTS: dict[str, Any] = {
    "run_dir": "runs/sft",
    "data": {"batch": 8},
    "optimizer": {"lr": 1e-4, "weight_decay": 0.0},
    "checkpoint": {"best": "val_loss"},
    "sample": {"temperature": 0.0},
}


def with_lengths(table: Mapping[str, Any], spec: SFTSpec, rows_per_epoch: int) -> TrainConfig:
    """The settings of training, with what follows from the size of the data where it was not set: steps from epochs,
    warm-up from its share, evaluation, sample and checkpoint once an epoch."""
    data = from_table(merge(DEFAULTS, table)).data
    if data.ramp_tokens:
        raise UserError("data.ramp_tokens: fine-tuning has updates of one size; leave the ramp out")
    per_epoch = rows_per_epoch / (data.batch * data.accumulate)
    steps = table.get("steps", max(1, math.ceil(spec.epochs * per_epoch)))
    every = max(1, min(round(per_epoch), steps))
    derived = {
        "steps": steps,
        "schedule": {"warmup": math.ceil(spec.warmup_share * steps)},
        "evaluation": {"every": every, "batches": 64},
        "sample": {"every": every},
        "checkpoint": {"every": every},
    }
    return from_table(merge(merge(DEFAULTS, derived), table))
