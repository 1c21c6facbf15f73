"""The checkpoint of a run that did best by one number of its evaluations, kept whatever follows it.

Held-out loss may rise long before what is wanted of a model stops getting better: InstructGPT trained 16 epochs on its
demonstrations, and chose among them by the score of a reward model.
"""

from __future__ import annotations

from pathlib import Path

from gptcore import checkpoint
from gptcore.errors import unknown_name
from gptcore.train.metrics import MetricsFile
from gptcore.train.processes import first_alone, from_first
from gptcore.train.run_state import Run, snapshot


def keep(now: Run, metrics: MetricsFile) -> None:
    """Save the run as it is where this step was evaluated, and better than all before; ties keep the earlier.

    Raises:
        UserError: the evaluation has no number of that name.
        CheckpointError: as of any checkpoint.
    """
    config = now.config
    every, last = config.evaluation.every, now.step == config.steps
    if not config.checkpoint.best or not (last or now.step % every == 0):
        return
    first_alone(now.member, lambda: _choose(now))
    now.best = from_first(now.member, now.best)
    if now.best is None or now.best["step"] != now.step:
        return
    tensors, values = snapshot(now, metrics)
    checkpoint.save(
        now.directory.best,
        now.step,
        tensors,
        values,
        keep_last=1,
        member=now.member if now.member.ranks > 1 else None,
        patience=config.parallel.timeout,
    )
    first_alone(now.member, lambda: _discard_others(now))


def path_of(now: Run) -> Path | None:
    """Where the best checkpoint of the run lies."""
    return None if now.best is None else checkpoint.path_of(now.directory.best, int(now.best["step"]))


def _choose(now: Run) -> None:
    spec = now.config.checkpoint
    if spec.best not in now.evaluation:
        raise unknown_name("checkpoint.best", spec.best, now.evaluation)
    value = now.evaluation[spec.best]
    sign = 1.0 if spec.best_mode == "min" else -1.0
    if now.best is None or sign * value < sign * now.best["value"]:  # NaN is never better
        now.best = {"step": now.step, "value": value}


def _discard_others(now: Run) -> None:
    """Those of a later step too, from before the run went back or was begun anew."""
    for step in checkpoint.steps(now.directory.best):
        if step != now.step:
            checkpoint.discard(now.directory.best, step)
