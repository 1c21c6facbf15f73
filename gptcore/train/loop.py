"""The training loop: one function a reader can follow from the first batch to the last checkpoint.

What makes it exact: the batch is a pure function of (seed, step), gradients of micro-batches are added in
their order, the learning rate is a function of the step, and a checkpoint holds weights, moments, masters
and generators. So a run that was killed and resumed equals one that never stopped, bit for bit.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.models import GPT
from gptcore.models.config import GPTConfig
from gptcore.report.progress import Progress
from gptcore.train import best, graphed, peak, processes, state, strategies
from gptcore.train.announce import draw_curves, headline, say_stopped
from gptcore.train.config import TrainConfig
from gptcore.train.evaluation import Batches
from gptcore.train.events import EventLog
from gptcore.train.guard import Guard
from gptcore.train.measure import due, log, measure, warn, watch_routing
from gptcore.train.metrics import MetricsFile
from gptcore.train.recovery import guarded_update, rewind
from gptcore.train.recovery_changes import Course, apply_due
from gptcore.train.recovery_changes import check as check_changes
from gptcore.train.routing import RoutingWatch
from gptcore.train.run_directory import RunDirectory
from gptcore.train.run_state import (
    Evaluate,
    Run,
    Sample,
    flops_of,
    resume_from,
    save,
    tokens_served,
    writer_of,
)
from gptcore.train.stop import StopRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Result(NamedTuple):
    """Where a run ended: updates done, last training loss (nats per token), the last evaluation, files.

    ``best``: the checkpoint that ``config.checkpoint.best`` chose, None where it names nothing.
    """

    step: int
    loss: float | None
    evaluation: dict[str, float]
    checkpoint: Path
    curve: Path | None
    seconds: float
    best: Path | None = None


def run(
    config: TrainConfig,
    *,
    model: torch.nn.Module,
    loader: Batches,
    evaluate: Evaluate | None = None,
    sample: Sample | None = None,
    tokenizer: Any = None,
    resume: bool = True,
    measure_peak: bool = True,
    quiet: bool = False,
) -> Result:
    """Train ``model`` on ``loader`` for ``config.steps`` updates, resuming what ``config.run_dir`` holds.

    Args:
        config: the settings; ``config.data`` and ``config.model`` describe, they are not built here.
        model: ``model(tokens, targets, **options)``, options being what a batch has of ``cu_seqlens`` and ``mask``,
            gives ``.loss`` (mean nats per token) and ``.z_loss``, with experts what ``GPTLoss`` has of them. Cast and
            moved as the config says; trained in place.
        loader: ``batch_at(i)`` for micro-batch i, counted from the start: ``config.micro_batches(step)``.
        evaluate: model → named numbers, ``val_loss`` and ``val_bits_per_byte`` among them; see ``held_out``.
        sample: model → text.
        tokenizer: with ``fingerprint``, kept in checkpoints and compared when resuming; without one, the
            loader's ``fingerprint`` is.
        resume: False refuses a run directory that holds checkpoints.
        measure_peak: False leaves out the second that MFU's peak costs; MFU is then unknown.
        quiet: no progress line.

    Raises:
        UserError: a run directory in use, another model or tokenizer than the checkpoint's, a full disk.
        NonFiniteError, SpikeError: NaN or infinite loss or gradient, a spike: where the policy is to stop, or going
            back is not possible or has not helped; the last checkpoint is intact.
        SystemExit: after SIGINT or SIGTERM, with 128 + signal, once the checkpoint is written.
    """
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    graphed.refuse_without(device)
    check_changes(config)
    _set_up(config)
    known = measure_peak and dtype != torch.float16  # which is computed in f32
    ceiling = peak.of(device, dtype) if known else peak.Peak(None, "not measured")
    _cast(model, device, dtype)
    _spare_memory(model, config)
    member = processes.member()
    called, optimizer = strategies.prepare(config, model)
    # Dropout starts from the seed, whatever the caller drew before; a resumed run restores the generator.
    torch.manual_seed(config.seed)
    with (
        processes.naming_lost_ranks(member, Path(config.run_dir)),
        RunDirectory(config.run_dir, member.rank) as directory,
    ):
        identity = state.identity(config, model, loader, tokenizer)
        course, guard = Course(config), Guard(config.recovery)
        now = Run(
            config, model, optimizer, loader, directory, evaluate, sample, identity, course, guard, member
        )
        now.called = called
        now.scaler = config.loss_scale.build() if dtype == torch.float16 else None
        layers = _expert_layers(model)
        now.routing = RoutingWatch(layers) if layers else None
        began = time.perf_counter()
        processes.first_alone(member, lambda: checkpoint.clean(directory.checkpoints))
        resumed = resume_from(now, resume, quiet)
        directory.write_config(config.to_dict())
        # Without a checkpoint nothing of an earlier attempt counts, not even its evaluation of step 0.
        metrics = MetricsFile(directory.metrics, now.step if resumed else -1)
        now.events, now.writer = EventLog(directory.events, now.event_count), writer_of(now)
        try:
            with now.writer, graphed.prepared(now):
                _train(now, metrics, ceiling, quiet)
        finally:
            metrics.close()
            now.events.close()
        curve = draw_curves(now) if member.rank == 0 else None
        path = checkpoint.path_of(directory.checkpoints, now.step)
        seconds = time.perf_counter() - began
        return Result(now.step, now.loss, now.evaluation, path, curve, seconds, best.path_of(now))


def _train(now: Run, metrics: MetricsFile, ceiling: peak.Peak, quiet: bool) -> None:
    """Updates, measurements and checkpoints from ``now.step`` to the end."""
    config = now.config
    flops = flops_of(now)
    with (
        StopRequest() as stop,
        Progress(config.steps, unit="step", label="train", start=now.step, quiet=quiet) as progress,
    ):
        progress.message(headline(now, flops, ceiling))
        if now.step == 0:
            measure(now, metrics, progress)
        while now.step < config.steps:
            start = time.perf_counter()
            outcome = guarded_update(now, apply_due(now), stop)
            now.tokens += tokens_served(now, now.course.batch(now.step - 1))
            now.train_seconds += time.perf_counter() - start
            watch_routing(now, metrics, progress, quiet)
            if now.step == config.steps or due(now.step, config.log_every):
                log(now, metrics, progress, flops, ceiling)
            progress.update(1)
            if outcome.saved:
                now.writer.wait()
            if outcome.warning is not None:
                metrics.write("warning", now.step, text=outcome.warning)
                warn(now, progress, quiet, outcome.warning)
            if outcome.verdict.action == "rewind" and (told := rewind(now, outcome, metrics)):
                progress.update(now.step - progress.done)
                warn(now, progress, quiet, told)
                continue
            measure(now, metrics, progress)
            best.keep(now, metrics)
            if outcome.signal or now.step == config.steps or due(now.step, config.checkpoint.every):
                save(now, metrics)
            if outcome.signal:
                now.writer.wait()
                progress.close()
                say_stopped(now, outcome.signal)
                raise SystemExit(128 + outcome.signal)
        now.writer.wait()


def _set_up(config: TrainConfig) -> None:
    from gptcore import backend

    backend.tune_malloc()
    if config.threads:
        backend.set_num_threads(config.threads)


def _cast(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Parameters to ``dtype``; buffers keep theirs, since rotary tables need f32."""
    model.to(device)
    for p in model.parameters():
        p.data = p.data.to(dtype)


def _spare_memory(model: torch.nn.Module, config: TrainConfig) -> None:
    kind = config.memory.activation_checkpointing
    if kind == "none":
        return  # a caller may have set the model's own
    if not isinstance(model, GPT):
        raise UserError(
            f"memory.activation_checkpointing: got {kind}, but {type(model).__name__} is no GPT of gptcore.models"
        )
    model.checkpoint_activations(kind, every=config.memory.every)


def _expert_layers(model: torch.nn.Module) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    return config.expert_layers if isinstance(config, GPTConfig) else ()
