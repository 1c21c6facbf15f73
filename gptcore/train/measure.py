"""What a run writes down as it goes: metrics, evaluations, samples, warnings of the routers."""

from __future__ import annotations

import sys

import torch

from gptcore.report.progress import Progress, format_count
from gptcore.train import strategies
from gptcore.train.metrics import MetricsFile, ModelFlops, throughput
from gptcore.train.peak import Peak
from gptcore.train.run_state import Run


def log(now: Run, metrics: MetricsFile, progress: Progress, flops: ModelFlops | None, ceiling: Peak) -> None:
    """One metrics line, with the speed since the line before, and the same on the progress line."""
    tokens, seconds = now.tokens - now.logged_tokens, now.train_seconds - now.logged_seconds
    now.logged_tokens, now.logged_seconds = now.tokens, now.train_seconds
    fields = {
        "tokens": now.tokens,
        "loss": now.loss,
        "grad_norm": now.grad_norm,
        "lr": now.course.learning_rate(now.step - 1),
        "seconds": now.train_seconds,
        **throughput(tokens, seconds, flops, ceiling),
        **({} if now.routing is None else now.routing.fields()),
        **_scale_fields(now),
        **_device_fields(now, seconds),
    }
    metrics.write("train", now.step, **fields)
    mfu = "unknown" if fields["mfu"] is None else f"{100 * fields['mfu']:.1f}%"
    rate = format_count(round(fields["tokens_per_s"]))
    progress.update(0, **{"loss": f"{now.loss:.4f}", "tok/s": rate, "MFU": mfu})


def _scale_fields(now: Run) -> dict[str, float]:
    """The loss scale of the next update, and the updates so far that overflowed."""
    if now.scaler is None:
        return {}
    return {"loss_scale": now.scaler.get_scale(), "skipped_updates": now.scaler.skipped}


def _device_fields(now: Run, seconds: float) -> dict[str, float]:
    """The share of the time in which the device was at work on captured updates: below 1 it waits for the host."""
    if now.graphs is None or seconds <= 0:
        return {}
    share, now.device_seconds = now.device_seconds / seconds, 0.0
    return {"device_share": share}


def watch_routing(now: Run, metrics: MetricsFile, progress: Progress, quiet: bool) -> None:
    """Say, and keep in the metrics, that a router has collapsed."""
    for sentence in [] if now.routing is None else now.routing.updated(now.member):
        metrics.write("warning", now.step, text=sentence)
        warn(now, progress, quiet, sentence)


def warn(now: Run, progress: Progress, quiet: bool, sentence: str) -> None:
    """Say on standard error what the user should know of this step."""
    text = f"gptcore: warning: step {now.step}: {sentence}"
    if quiet:  # which is meant for progress
        print(text, file=sys.stderr, flush=True)
    progress.message(text)


def measure(now: Run, metrics: MetricsFile, progress: Progress) -> None:
    """Evaluation and sample where they are due: every so many updates and at the end, evaluation also at 0.

    Neither may change the run, so the generators are put back and nothing has gradients.
    """
    config, last = now.config, now.step == now.config.steps
    if now.member.rank and not strategies.is_spread(config):
        return  # rank 0's weights are whole, and it alone is asked
    evaluates = config.evaluation.every > 0 and (last or due(now.step, config.evaluation.every))
    samples = config.sample.every > 0 and now.step > 0 and (last or due(now.step, config.sample.every))
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
    strategies.let_go(now.model)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many updates (0: never) does after ``step`` of them."""
    return every > 0 and step % every == 0
