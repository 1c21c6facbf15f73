"""What a run says of itself on the terminal, and the curves it leaves."""

from __future__ import annotations

import sys
from pathlib import Path

from gptcore.models import accounting
from gptcore.models.config import GPTConfig
from gptcore.report.progress import format_count
from gptcore.train.metrics import FORMULA, ModelFlops
from gptcore.train.peak import Peak
from gptcore.train.run_state import Run, tokens_per_update
from gptcore.train.stop import resume_command


def headline(now: Run, flops: ModelFlops | None, ceiling: Peak) -> str:
    """What is trained, on how much at a time, at what cost and under which ceiling."""
    parameters = f"{format_count(sum(p.numel() for p in now.model.parameters()))} parameters"
    if now.routing is not None:
        config = now.model.config
        assert isinstance(config, GPTConfig)
        parameters += f" ({format_count(accounting.active_parameters(config))} for each token)"
    data = now.config.data
    batch = f"{data.batch * data.length * data.accumulate}"
    if data.ramp_tokens:
        batch = f"{tokens_per_update(now.config, 0)} to {batch}"
    cost = f"{flops.per_token / 1e6:.3g} MFLOP/token ({FORMULA})" if flops else "FLOPs per token unknown"
    return f"{parameters}, {now.config.dtype}, {batch} tokens/update, {cost}, {ceiling}"


def say_stopped(now: Run, signal: int) -> None:
    """That the run stopped when asked to, and how to go on."""
    if now.member.rank:
        return
    print(
        f"gptcore: stopped by signal {signal} after step {now.step}, checkpoint saved\n"
        f"gptcore: resume with: {resume_command(now.directory.path)}",
        file=sys.stderr,
        flush=True,
    )


def draw_curves(now: Run) -> Path | None:
    """Draw the curves from the metrics; the loss curve's path, or None where it cannot be written."""
    from gptcore.report import plot
    from gptcore.train.metrics import read

    lines = read(now.directory.metrics)
    routing = [(line["step"], line["routing"]) for line in lines if line.get("routing")]
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train" and line["loss"]]
    held = [(e["step"], e["val_loss"]) for e in lines if e["kind"] == "evaluation" and "val_loss" in e]
    try:
        plot.routing_curves(now.directory.routing, routing, title=now.directory.path.name)
        return plot.loss_curve(now.directory.curve, train, held, title=now.directory.path.name)
    except OSError as error:  # the run itself is whole and saved
        print(f"gptcore: cannot write {now.directory.curve}: {error.strerror}", file=sys.stderr)
        return None
