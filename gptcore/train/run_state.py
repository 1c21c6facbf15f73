"""A run under way: what its steps share, saved to a checkpoint and taken up from one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptcore import checkpoint
from gptcore.dist import Member
from gptcore.errors import UserError
from gptcore.models.config import GPTConfig
from gptcore.optim import LossScaler
from gptcore.optim.divided import Divided
from gptcore.train import checkpoints_kept, sharding, state
from gptcore.train.config import TrainConfig
from gptcore.train.device_batches import DeviceBatches
from gptcore.train.evaluation import Batches
from gptcore.train.events import EventLog
from gptcore.train.graph import Launched, StepGraphs
from gptcore.train.guard import Guard
from gptcore.train.metrics import MetricsFile, ModelFlops
from gptcore.train.processes import first_alone, from_first
from gptcore.train.recovery_changes import Course, adjust
from gptcore.train.routing import RoutingWatch
from gptcore.train.run_directory import RunDirectory

Evaluate = Callable[[torch.nn.Module], Mapping[str, float]]
Sample = Callable[[torch.nn.Module], str]


@dataclass
class Run:
    """What the steps of one run share.

    ``called`` is the model, or what it is wrapped in to train. ``train_seconds`` counts updates only, over all resumed
    parts; ``loss`` and ``grad_norm`` are the last update's, ``scaler`` is float16's, ``rewinds`` counts how often the
    run has gone back. ``events`` and ``writer`` are there while it trains.
    """

    config: TrainConfig
    model: torch.nn.Module
    optimizer: sharding.Optimizer
    loader: Batches
    directory: RunDirectory
    evaluate: Evaluate | None
    sample: Sample | None
    identity: dict[str, Any]
    course: Course
    guard: Guard
    member: Member
    events: EventLog = field(init=False)
    writer: checkpoint.Writer = field(init=False)
    event_count: int = 0
    rewinds: int = 0
    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    logged_tokens: int = 0
    logged_seconds: float = 0.0
    loss: float | None = None
    grad_norm: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    routing: RoutingWatch | None = None
    scaler: LossScaler | None = None
    best: dict[str, float] | None = None  # step and value of the best evaluation so far
    called: torch.nn.Module = field(init=False)
    batches: DeviceBatches | None = None  # of the loader, where a device computes meanwhile
    graphs: StepGraphs | None = None
    device_seconds: float = 0.0  # that captured updates took the device since the last line of the metrics
    ahead: Launched | None = (
        None  # the update after the last that was looked at, where the device has it already
    )


def resume_from(now: Run, resume: bool, quiet: bool) -> bool:
    """Put the newest good checkpoint, if there is one, into the run; tells whether there was one."""
    directory = now.directory.checkpoints
    if not resume and checkpoint.steps(directory):
        raise UserError(
            f"{now.directory.path} holds a run at step {checkpoint.steps(directory)[-1]}; "
            "resume it, or choose another run_dir"
        )
    found = opened(now.member, lambda: checkpoint.latest(directory))
    if found is None:
        return False
    saved = found.state
    state.compare(found.path, saved, now.identity)
    if saved["step"] > now.config.steps:
        raise UserError(f"{found.path} is at step {saved['step']}, beyond steps = {now.config.steps}")
    take_up(now, found)
    now.rewinds, now.event_count = saved["recovery"]["rewinds"], saved["recovery"]["events"]
    if not quiet:
        changed = state.changes(saved["config"], now.identity["config"])
        note = f" with changed settings ({', '.join(changed)})" if changed else ""
        print(f"gptcore: resuming {now.directory.path} at step {now.step}{note}", file=sys.stderr)
    return True


def opened(member: Member, choose: Callable[[], Path | None]) -> checkpoint.Checkpoint | None:
    """The checkpoint that ``choose`` finds whole on rank 0, open on every rank; None where it finds none."""
    found: list[Path | None] = []
    first_alone(member, lambda: found.append(choose()))
    path = from_first(member, found[0] if found else None)
    return None if path is None else checkpoint.Checkpoint(path)


def take_up(now: Run, found: checkpoint.Checkpoint) -> None:
    """Put a checkpoint into the run: all but how often it has gone back, and its log of that."""
    saved = found.state
    now.course.restore(saved["recovery"]["course"], saved["step"])
    now.guard.restore(saved["recovery"]["guard"])
    adjust(now)
    if isinstance(now.optimizer, Divided):
        sharding.restore(now.model, now.optimizer, found)
    else:
        state.restore(now.model, now.optimizer, {name: found.read(name) for name in found.names}, saved)
    if now.scaler is not None and "loss_scale" in saved:
        now.scaler.load_state_dict(saved["loss_scale"])
    now.step = saved["step"]
    now.tokens = saved["metrics"]["tokens"]
    now.train_seconds = saved["metrics"]["seconds"]
    now.logged_tokens, now.logged_seconds = now.tokens, now.train_seconds
    now.evaluation = saved["metrics"]["evaluation"]
    now.best = saved["metrics"].get("best")
    if now.routing is not None:
        now.routing = RoutingWatch(now.routing.layers)


def writer_of(now: Run) -> checkpoint.Writer:
    """What writes the run's checkpoints as its settings say."""
    config = now.config
    return checkpoint.Writer(
        now.directory.checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        member=now.member if now.member.ranks > 1 else None,
        patience=config.parallel.timeout,
        asynchronous=config.checkpoint.asynchronous,
    )


def save(now: Run, metrics: MetricsFile) -> None:
    """Begin a checkpoint of the run as it is, its metrics and events on the disk before it.

    Raises:
        CheckpointError: of this one or the one before, as :class:`gptcore.checkpoint.Writer` says.
    """
    now.writer.wait()  # what is there decides what is spared
    tensors, values = snapshot(now, metrics)
    spared = checkpoints_kept.spared(now.directory.checkpoints, now.step, now.config)
    now.writer.begin(now.step, tensors, values, spared=spared)


def snapshot(now: Run, metrics: MetricsFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """What this rank has to save, and the state of the run, its metrics and events on the disk before it."""
    metrics.sync()
    now.events.sync()
    tensors, values = _collected(now)
    values["metrics"] = {"tokens": now.tokens, "seconds": now.train_seconds, "evaluation": now.evaluation}
    if now.best is not None:
        values["metrics"]["best"] = now.best
    if now.scaler is not None:
        values["loss_scale"] = now.scaler.state_dict()
    values["recovery"] = {
        "course": now.course.state(),
        "guard": now.guard.state(),
        "rewinds": now.rewinds,
        "events": now.events.count,
    }
    return tensors, {**now.identity, **values}


def _collected(now: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """What this rank has to save."""
    if not isinstance(now.optimizer, Divided):
        tensors, values = state.collect(now.model, now.optimizer)
        return (tensors if now.member.rank == 0 else {}), values
    slices, whole, values = sharding.collect(now.model, now.optimizer)
    if now.member.rank == 0:
        whole |= state.generators()
    return {**slices, **(whole if now.member.rank == 0 else {})}, values


def tokens_served(now: Run, step: int) -> int:
    """Tokens of the update with zero-based index ``step``, as its loader tells where its rows are not all full."""
    tell = getattr(now.loader, "tokens_of_update", None)
    return tokens_per_update(now.config, step) if tell is None else int(tell(step))


def tokens_per_update(config: TrainConfig, step: int) -> int:
    """Of the update with zero-based index ``step``, in full rows."""
    return config.data.batch * config.data.length * len(config.micro_batches(step))


def flops_of(now: Run) -> ModelFlops | None:
    """What training on one token costs; None for a model that is no GPT."""
    config = getattr(now.model, "config", None)
    if not isinstance(config, GPTConfig):
        return None
    memory = now.config.memory  # selective checkpointing makes no product again
    anew = memory.activation_checkpointing == "block"
    remade = range(0, config.num_layers, memory.every) if anew else range(0)
    return ModelFlops.of(config, now.config.data.length, remade)
