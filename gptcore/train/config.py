"""The settings of a training run: one frozen, checked, nested dataclass, written as TOML."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gptcore.errors import UserError
from gptcore.models import presets
from gptcore.models.config import GPTConfig
from gptcore.models.schema import Spec, at_least
from gptcore.optim import LossScaler
from gptcore.optim import schedule as schedules
from gptcore.train.optimizers import OptimizerSpec
from gptcore.train.recovery_spec import Change, RecoverySpec

if TYPE_CHECKING:
    from typing_extensions import Self

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@functools.lru_cache(maxsize=4)
def _ramp(size: int, full: int, start: int, tokens: int) -> schedules.BatchRamp:
    """Kept, since it remembers where each update of the ramp begins."""
    return schedules.BatchRamp(size, full, start, tokens)


@dataclass(frozen=True)
class DataSpec(Spec):
    """What is trained on, and the shape of a batch.

    ``path``: text files, prepared shards, or ``builtin``. ``tokenizer``: as ``gptcore.data.tokenizer.load``
    takes it; None leaves it to what ``path`` was prepared with. One update sees ``accumulate`` micro-batches
    of (``batch``, ``length``) tokens; with ``ramp_tokens`` > 0 the batch grows linearly from ``ramp_from`` tokens
    to that as the first ``ramp_tokens`` tokens go by (GPT-3, appendix B), in whole micro-batches. ``mode`` is
    the loader's order: ``shuffled`` sees each window once per
    epoch, ``random`` begins rows anywhere, with replacement. ``packed`` keeps attention inside documents.
    """

    section: ClassVar[str] = "data"

    path: str | tuple[str, ...] = "builtin"
    tokenizer: str | None = None
    vocab_size: int | None = None  # of a tokenizer that is to be trained
    held_out: float = 0.1  # share of the text kept for evaluation
    batch: int = 8  # B
    length: int = 256  # T
    accumulate: int = 1
    ramp_tokens: int = 0
    ramp_from: int = 32_000
    mode: Literal["shuffled", "random", "ordered"] = "shuffled"
    packed: bool = False

    def validate(self) -> None:
        at_least("data.", 1, batch=self.batch, length=self.length, accumulate=self.accumulate)
        at_least("data.", 1, vocab_size=self.vocab_size, ramp_from=self.ramp_from)
        at_least("data.", 0, ramp_tokens=self.ramp_tokens)
        if not 0.0 < self.held_out < 1.0:
            raise UserError(f"data.held_out: expected above 0 and below 1, got {self.held_out}")


@dataclass(frozen=True)
class ScheduleSpec(Spec):
    """The learning rate over the steps; ``optimizer.lr`` is its peak.

    ``floor``: the rate at the end (None: a tenth of the peak). ``decay``: updates of wsd's last phase, ``shape``
    its form. ``palm`` has no warm-up: it keeps the peak for 10,000 updates.
    """

    section: ClassVar[str] = "schedule"

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "palm", "wsd"] = "cosine"
    warmup: int = 100
    floor: float | None = None
    decay: int | None = None
    shape: Literal["linear", "sqrt", "exponential"] = "linear"

    def validate(self) -> None:
        at_least("schedule.", 0, warmup=self.warmup, floor=self.floor, decay=self.decay)


@dataclass(frozen=True)
class MemorySpec(Spec):
    """What is computed anew instead of kept: ``GPT.checkpoint_activations`` in every ``every``-th block."""

    section: ClassVar[str] = "memory"

    activation_checkpointing: Literal["none", "selective", "block"] = "none"
    every: int = 1

    def validate(self) -> None:
        at_least("memory.", 1, every=self.every)


@dataclass(frozen=True)
class LossScaleSpec(Spec):
    """Of ``dtype = "float16"``: :class:`gptcore.optim.LossScaler`, whose names these are."""

    section: ClassVar[str] = "loss_scale"

    init_scale: float = 65536.0
    growth_interval: int = 2000
    minimum: float = 1.0
    patience: int = 30

    def validate(self) -> None:
        try:
            self.build()
        except ValueError as error:
            raise UserError(f"loss_scale: {error}") from error

    def build(self) -> LossScaler:
        """A scaler at its start."""
        return LossScaler(
            self.init_scale,
            growth_interval=self.growth_interval,
            minimum=self.minimum,
            patience=self.patience,
        )


@dataclass(frozen=True)
class EvaluationSpec(Spec):
    """Held-out loss over ``batches`` batches: at step 0, every ``every`` updates, at the end (0: never)."""

    section: ClassVar[str] = "evaluation"

    every: int = 250
    batches: int = 20

    def validate(self) -> None:
        at_least("evaluation.", 0, every=self.every)
        at_least("evaluation.", 1, batches=self.batches)


@dataclass(frozen=True)
class SampleSpec(Spec):
    """Text written by the model every ``every`` updates (0: never)."""

    section: ClassVar[str] = "sample"

    every: int = 0
    prompt: str = "\n"
    tokens: int = 100
    temperature: float = 0.8
    top_k: int = 0

    def validate(self) -> None:
        at_least("sample.", 0, every=self.every, temperature=self.temperature, top_k=self.top_k)
        at_least("sample.", 1, tokens=self.tokens)


@dataclass(frozen=True)
class CheckpointSpec(Spec):
    """A checkpoint every ``every`` updates (0: only the last).

    The newest ``keep_last`` stay, and those of every ``keep_every``-th update (0: none). ``asynchronous`` writes a copy
    while training goes on; false waits for the disk and needs no copy. ``best`` names a number of the evaluations, such
    as ``val_loss``: the checkpoint with the smallest one (``best_mode`` "max": the largest) is kept too, in ``best/``.
    """

    section: ClassVar[str] = "checkpoint"

    every: int = 250
    keep_last: int = 3
    keep_every: int = 0
    asynchronous: bool = True
    best: str = ""
    best_mode: Literal["min", "max"] = "min"

    def validate(self) -> None:
        at_least("checkpoint.", 0, every=self.every, keep_every=self.keep_every)
        at_least("checkpoint.", 1, keep_last=self.keep_last)


@dataclass(frozen=True)
class ParallelSpec(Spec):
    """How an update is divided over processes, and the order in which its gradients are added.

    An update's sequences are cut into leaves of ``grain`` sequences (0: ``data.batch``, or what a resumed run has).
    With ``strategy`` ``zero`` their gradients are added in a fixed tree, so that any number of processes that divides
    the leaves gives the same bits; ``fixed_tree`` false adds them as they come. ``zero``: what
    :class:`gptcore.optim.ZeroOptimizer` divides. ``ddp`` and ``fsdp2`` are torch's ``DistributedDataParallel`` and
    ``fully_shard``, which add as they do and give one process's numbers up to rounding.
    ``timeout``: seconds after which a process that waits for another gives up; one that ended is noticed at once.
    """

    section: ClassVar[str] = "parallel"

    strategy: Literal["zero", "ddp", "fsdp2"] = "zero"
    zero: int = 0
    grain: int = 0
    fixed_tree: bool | None = None
    timeout: float = 1800.0

    def validate(self) -> None:
        at_least("parallel.", 0, zero=self.zero, grain=self.grain)
        at_least("parallel.", 1.0, timeout=self.timeout)
        if self.zero > 3:
            raise UserError(f"parallel.zero: expected 0, 1, 2 or 3, got {self.zero}")
        for name, given in (("zero", self.zero > 0), ("fixed_tree", self.fixed_tree)):
            if given and self.strategy != "zero":
                raise UserError(
                    f"parallel.{name}: only strategy zero has it, got {getattr(self, name)} with {self.strategy}; "
                    "leave it out"
                )

    @property
    def in_fixed_tree(self) -> bool:
        """Whether leaves are added in the order that no number of processes changes; ``zero`` does so unless told."""
        return self.strategy == "zero" and self.fixed_tree is not False


@dataclass(frozen=True)
class TrainConfig(Spec):
    """Everything that decides a run. The same config gives the same bits, whatever the thread count.

    ``model`` is a table of :class:`GPTConfig`, optionally over ``preset = "gpt2"``; :meth:`model_config` resolves
    it. ``start`` names a run, checkpoint or Hugging Face directory whose weights the run begins with; a dense
    model's go to every expert of one with experts. ``dtype`` bfloat16 trains bf16 weights with f32 masters, and
    float16 does so under a loss scale. ``threads`` 0 takes what the machine gives. ``log_every`` is in updates.
    ``changes`` are applied under way, each at its step. ``graphs``: on CUDA, updates are captured as CUDA graphs where
    they can be (``gptcore.train.graph``), with the same numbers.
    """

    section: ClassVar[str] = ""

    run_dir: str = "runs/gpt"
    start: str | None = None
    steps: int = 2000
    seed: int = 1337
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    threads: int = 0
    graphs: bool = True
    z_loss: float = 0.0
    log_every: int = 1
    model: dict = field(default_factory=dict)  # type: ignore[type-arg]
    data: DataSpec = field(default_factory=DataSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    loss_scale: LossScaleSpec = field(default_factory=LossScaleSpec)
    memory: MemorySpec = field(default_factory=MemorySpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    sample: SampleSpec = field(default_factory=SampleSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    recovery: RecoverySpec = field(default_factory=RecoverySpec)
    changes: tuple[Change, ...] = ()
    parallel: ParallelSpec = field(default_factory=ParallelSpec)

    def validate(self) -> None:
        at_least("", 1, steps=self.steps, log_every=self.log_every)
        at_least("", 0, seed=self.seed, threads=self.threads, z_loss=self.z_loss)
        if not self.run_dir:
            raise UserError("run_dir: expected a directory, got an empty string")
        for name in ("loss", "grad_norm", "loss_scale"):
            if getattr(self.recovery, name) == "rewind" and self.checkpoint.every == 0:
                raise UserError(
                    f"recovery.{name}: rewind needs checkpoints to go back to; set checkpoint.every"
                )
        if self.parallel.strategy == "fsdp2" and self.optimizer.name in ("adafactor", "adamw_8bit"):
            raise UserError(
                f"parallel.strategy: fsdp2 cuts weights anywhere between rows, and {self.optimizer.name} has "
                "statistics of more than one element; use strategy zero or ddp, or adamw, adam or sgd"
            )
        if self.data.batch * self.data.accumulate % self.grain:
            raise UserError(
                f"parallel.grain: {self.grain} sequences do not divide the {self.data.batch * self.data.accumulate} of "
                "an update (data.batch times data.accumulate)"
            )
        if self.checkpoint.best and not self.evaluation.every:
            raise UserError("checkpoint.best: needs evaluations to choose by; set evaluation.every")
        model = self.model_config()
        if model.position.kind == "learned" and self.data.length > model.context_length:
            raise UserError(
                f"data.length: {self.data.length} is more than model.context_length {model.context_length}"
            )

    def model_config(self, vocab_size: int | None = None) -> GPTConfig:
        """The model's own config; ``vocab_size`` is the tokenizer's, used unless the table names one.

        Raises:
            UserError: unknown preset or key, or a vocabulary smaller than the tokenizer's.
        """
        table = dict(self.model)
        preset = table.pop("preset", None)
        if vocab_size is not None:
            table.setdefault("vocab_size", vocab_size)
        config = presets.get(preset).merged(table) if preset else GPTConfig.from_dict(table)
        if vocab_size is not None and config.vocab_size < vocab_size:
            raise UserError(
                f"model.vocab_size: {config.vocab_size} is less than the tokenizer's {vocab_size}; "
                f"set model.vocab_size={vocab_size} or use the tokenizer that belongs to the model"
            )
        return config

    def learning_rate(self, step: int) -> float:
        """The rate of the update with zero-based index ``step``."""
        spec, peak = self.schedule, self.optimizer.lr
        options: dict[str, Any] = {} if spec.name == "palm" else {"warmup": spec.warmup}
        if spec.name in ("linear", "cosine", "wsd"):
            options["steps"] = self.steps
            options["floor"] = peak / 10 if spec.floor is None else spec.floor
        if spec.name == "wsd":
            options["decay"] = spec.decay
            options["shape"] = spec.shape
        return schedules.get(spec.name)(step, peak=peak, **options)

    @property
    def grain(self) -> int:
        """Sequences of a leaf."""
        return self.parallel.grain or self.data.batch

    def sequences(self, step: int) -> range:
        """The numbers of the sequences of the update with zero-based index ``step``, counted from the start."""
        micro = self.micro_batches(step)
        return range(micro.start * self.data.batch, micro.stop * self.data.batch)

    def micro_batches(self, step: int) -> range:
        """The numbers of the micro-batches of the update with zero-based index ``step``, counted from the start."""
        data = self.data
        if not data.ramp_tokens:
            return range(step * data.accumulate, (step + 1) * data.accumulate)
        return _ramp(
            data.batch * data.length, data.accumulate, data.ramp_from, data.ramp_tokens
        ).micro_batches(step)

    def with_overrides(self, overrides: Sequence[str]) -> Self:
        """A copy with ``key.sub=value`` settings laid over it; values are TOML, or else plain strings."""
        config = self
        for text in overrides:
            config = config.merged(override(text))
        return config


def load(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Reads a TOML file and lays ``key.sub=value`` overrides over it, and it over the table ``base``.

    Raises:
        UserError: no such file, not TOML, an unknown key (with the nearest name), a wrong type or value.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no config file at {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config {path} is not valid TOML: {error}") from error
    return from_table(merge(base or {}, table), overrides)


def from_table(table: Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """As :func:`load`, from nested plain values."""
    merged: dict[str, Any] = dict(table)
    for text in overrides:
        merged = merge(merged, override(text))
    return TrainConfig.from_dict(merged)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, table by table."""
    result = dict(base)
    for name, value in over.items():
        inner = result.get(name)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[name] = merge(inner, value) if both else value  # type: ignore[arg-type]
    return result


def override(text: str) -> dict[str, Any]:
    """The table that ``key.sub=value`` stands for; the value is TOML, or else a plain string."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"--set {text}: expected key=value, as in optimizer.lr=3e-4")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for name in reversed(names):
        parsed = {name: parsed}
    return dict(parsed)
