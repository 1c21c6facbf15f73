"""The training loop: one function a reader can follow from the first batch to the last checkpoint.

What makes it exact: the batch is a pure function of (seed, step), gradients of micro-batches are added in
their order, the learning rate is a function of the step, and a checkpoint holds weights, moments, masters
and generators. So a run that was killed and resumed equals one that never stopped, bit for bit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.models import accounting
from gptcore.models.config import GPTConfig
from gptcore.optim.fused import FusedOptimizer
from gptcore.report.progress import Progress, format_count
from gptcore.train import optimizers, peak, state
from gptcore.train.config import TrainConfig
from gptcore.train.evaluation import Batches
from gptcore.train.metrics import FORMULA, MetricsFile, ModelFlops, throughput
from gptcore.train.routing import RoutingWatch
from gptcore.train.run_directory import RunDirectory
from gptcore.train.step import update
from gptcore.train.stop import StopRequest, resume_command

Evaluate = Callable[[torch.nn.Module], Mapping[str, float]]
Sample = Callable[[torch.nn.Module], str]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Result(NamedTuple):
    """Where a run ended: updates done, last training loss (nats per token), the last evaluation, files."""

    step: int
    loss: float | None
    evaluation: dict[str, float]
    checkpoint: Path
    curve: Path | None
    seconds: float


@dataclass
class _Run:
    """What the steps of one run share. ``train_seconds`` counts updates only, over all resumed parts."""

    config: TrainConfig
    model: torch.nn.Module
    optimizer: FusedOptimizer
    loader: Batches
    directory: RunDirectory
    evaluate: Evaluate | None
    sample: Sample | None
    identity: dict[str, Any]
    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    logged_tokens: int = 0
    logged_seconds: float = 0.0
    loss: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    routing: RoutingWatch | None = None


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
        NonFiniteError: NaN or infinite loss or gradient; the last checkpoint is intact.
        SystemExit: after SIGINT or SIGTERM, with 128 + signal, once the checkpoint is written.
    """
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    _set_up(config)
    ceiling = peak.of(device, dtype) if measure_peak else peak.Peak(None, "not measured")
    _cast(model, device, dtype)
    optimizer = optimizers.build(config.optimizer, model)
    # Dropout starts from the seed, whatever the caller drew before; a resumed run restores the generator.
    torch.manual_seed(config.seed)
    with RunDirectory(config.run_dir) as directory:
        identity = state.identity(config, model, loader, tokenizer)
        now = _Run(config, model, optimizer, loader, directory, evaluate, sample, identity)
        layers = _expert_layers(model)
        now.routing = RoutingWatch(layers) if layers else None
        began = time.perf_counter()
        checkpoint.clean(directory.checkpoints)
        resumed = _resume(now, resume, quiet)
        directory.write_config(config.to_dict())
        # Without a checkpoint nothing of an earlier attempt counts, not even its evaluation of step 0.
        metrics = MetricsFile(directory.metrics, now.step if resumed else -1)
        try:
            _train(now, metrics, ceiling, quiet)
        finally:
            metrics.close()
        curve = _plot(now)
        path = checkpoint.path_of(directory.checkpoints, now.step)
        return Result(now.step, now.loss, now.evaluation, path, curve, time.perf_counter() - began)


def _train(now: _Run, metrics: MetricsFile, ceiling: peak.Peak, quiet: bool) -> None:
    """Updates, measurements and checkpoints from ``now.step`` to the end."""
    config = now.config
    flops = _flops(now)
    with (
        StopRequest() as stop,
        Progress(config.steps, unit="step", label="train", start=now.step, quiet=quiet) as progress,
    ):
        progress.message(_headline(now, flops, ceiling))
        if now.step == 0:
            _measure(now, metrics, progress)
        while now.step < config.steps:
            start = time.perf_counter()
            now.loss = update(config, now.model, now.optimizer, now.loader, now.step, routing=now.routing)
            now.tokens += _tokens_per_update(config, now.step)
            now.step += 1
            now.train_seconds += time.perf_counter() - start
            _watch_routing(now, metrics, progress, quiet)
            if now.step == config.steps or _due(now.step, config.log_every):
                _log(now, metrics, progress, flops, ceiling)
            progress.update(1)
            _measure(now, metrics, progress)
            stops = stop.signal is not None
            if stops or now.step == config.steps or _due(now.step, config.checkpoint.every):
                _save(now, metrics)
            if stop.signal is not None and stops:
                progress.close()
                _say_stopped(now, stop.signal)
                raise SystemExit(128 + stop.signal)


def _log(
    now: _Run, metrics: MetricsFile, progress: Progress, flops: ModelFlops | None, ceiling: peak.Peak
) -> None:
    """One metrics line, with the speed since the line before, and the same on the progress line."""
    tokens, seconds = now.tokens - now.logged_tokens, now.train_seconds - now.logged_seconds
    now.logged_tokens, now.logged_seconds = now.tokens, now.train_seconds
    fields = {
        "tokens": now.tokens,
        "loss": now.loss,
        "grad_norm": now.optimizer.last_grad_norm,
        "lr": now.config.learning_rate(now.step - 1),
        "seconds": now.train_seconds,
        **throughput(tokens, seconds, flops, ceiling),
        **({} if now.routing is None else now.routing.fields()),
    }
    metrics.write("train", now.step, **fields)
    mfu = "unknown" if fields["mfu"] is None else f"{100 * fields['mfu']:.1f}%"
    rate = format_count(round(fields["tokens_per_s"]))
    progress.update(0, **{"loss": f"{now.loss:.4f}", "tok/s": rate, "MFU": mfu})


def _watch_routing(now: _Run, metrics: MetricsFile, progress: Progress, quiet: bool) -> None:
    """Say, and keep in the metrics, that a router has collapsed."""
    for sentence in [] if now.routing is None else now.routing.updated():
        metrics.write("warning", now.step, text=sentence)
        text = f"gptcore: warning: step {now.step}: {sentence}"
        if quiet:  # which is meant for progress
            print(text, file=sys.stderr, flush=True)
        progress.message(text)


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


def _resume(now: _Run, resume: bool, quiet: bool) -> bool:
    """Put the newest good checkpoint, if there is one, into the run; tells whether there was one."""
    directory = now.directory.checkpoints
    if not resume and checkpoint.steps(directory):
        raise UserError(
            f"{now.directory.path} holds a run at step {checkpoint.steps(directory)[-1]}; "
            "resume it, or choose another run_dir"
        )
    found = checkpoint.load_latest(directory)
    if found is None:
        return False
    saved = found.state
    state.compare(found.path, saved, now.identity)
    if saved["step"] > now.config.steps:
        raise UserError(f"{found.path} is at step {saved['step']}, beyond steps = {now.config.steps}")
    state.restore(now.model, now.optimizer, found.tensors, saved)
    now.step = saved["step"]
    now.tokens = saved["metrics"]["tokens"]
    now.train_seconds = saved["metrics"]["seconds"]
    now.logged_tokens, now.logged_seconds = now.tokens, now.train_seconds
    now.evaluation = saved["metrics"]["evaluation"]
    if not quiet:
        changed = state.changes(saved["config"], now.identity["config"])
        note = f" with changed settings ({', '.join(changed)})" if changed else ""
        print(f"gptcore: resuming {now.directory.path} at step {now.step}{note}", file=sys.stderr)
    return True


def _save(now: _Run, metrics: MetricsFile) -> None:
    metrics.sync()
    tensors, values = state.collect(now.model, now.optimizer)
    values["metrics"] = {"tokens": now.tokens, "seconds": now.train_seconds, "evaluation": now.evaluation}
    keep = now.config.checkpoint.keep_last
    checkpoint.save(now.directory.checkpoints, now.step, tensors, {**now.identity, **values}, keep)


def _tokens_per_update(config: TrainConfig, step: int) -> int:
    return config.data.batch * config.data.length * len(config.micro_batches(step))


def _flops(now: _Run) -> ModelFlops | None:
    config = getattr(now.model, "config", None)
    return ModelFlops.of(config, now.config.data.length) if isinstance(config, GPTConfig) else None


def _expert_layers(model: torch.nn.Module) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    return config.expert_layers if isinstance(config, GPTConfig) else ()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _measure(now: _Run, metrics: MetricsFile, progress: Progress) -> None:
    """Evaluation and sample where they are due: every so many updates and at the end, evaluation also at 0.

    Neither may change the run, so the generators are put back and nothing has gradients.
    """
    config, last = now.config, now.step == now.config.steps
    evaluates = config.evaluation.every > 0 and (last or _due(now.step, config.evaluation.every))
    samples = config.sample.every > 0 and now.step > 0 and (last or _due(now.step, config.sample.every))
    devices = [torch.cuda.current_device()] if config.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        now.model.eval()
        if now.evaluate is not None and evaluates:
            now.evaluation = {name: float(value) for name, value in now.evaluate(now.model).items()}
            metrics.write("evaluation", now.step, **now.evaluation)
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in now.evaluation.items())
            progress.message(f"step {now.step}  {numbers}")
        if now.sample is not None and samples:
            text = now.sample(now.model)
            metrics.write("sample", now.step, text=text)
            progress.message(f"step {now.step}  sample: {text}")
        now.model.train()


def _headline(now: _Run, flops: ModelFlops | None, ceiling: peak.Peak) -> str:
    parameters = f"{format_count(sum(p.numel() for p in now.model.parameters()))} parameters"
    if now.routing is not None:
        config = now.model.config
        assert isinstance(config, GPTConfig)
        parameters += f" ({format_count(accounting.active_parameters(config))} for each token)"
    data = now.config.data
    batch = f"{data.batch * data.length * data.accumulate}"
    if data.ramp_tokens:
        batch = f"{_tokens_per_update(now.config, 0)} to {batch}"
    cost = f"{flops.per_token / 1e6:.3g} MFLOP/token ({FORMULA})" if flops else "FLOPs per token unknown"
    return f"{parameters}, {now.config.dtype}, {batch} tokens/update, {cost}, {ceiling}"


def _say_stopped(now: _Run, signal: int) -> None:
    print(
        f"gptcore: stopped by signal {signal} after step {now.step}, checkpoint saved\n"
        f"gptcore: resume with: {resume_command(now.directory.path)}",
        file=sys.stderr,
        flush=True,
    )


def _plot(now: _Run) -> Path | None:
    from gptcore.report import plot
    from gptcore.train.metrics import read

    lines = read(now.directory.metrics)
    routing = [(line["step"], line["routing"]) for line in lines if line.get("routing")]
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    held = [(e["step"], e["val_loss"]) for e in lines if e["kind"] == "evaluation" and "val_loss" in e]
    try:
        plot.routing_curves(now.directory.routing, routing, title=now.directory.path.name)
        return plot.loss_curve(now.directory.curve, train, held, title=now.directory.path.name)
    except OSError as error:  # the run itself is whole and saved
        print(f"gptcore: cannot write {now.directory.curve}: {error.strerror}", file=sys.stderr)
        return None
