"""Spike recovery: what the detectors see in each update, what follows from it, and the log that tells it.

PaLM (Chowdhery et al. 2022, section 5.1) met spikes of the loss by going back about 100 updates and passing over 200 to
500 batches; OPT (Zhang et al. 2022, section 2.5) by changing the run under way.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as c10d

from gptcore import checkpoint
from gptcore.dist.group import agree, member_of
from gptcore.errors import UserError
from gptcore.train import checkpoints_kept, graphed
from gptcore.train.guard import Guard, Sighting, Verdict
from gptcore.train.processes import first_alone
from gptcore.train.run_state import Run, opened, save, take_up
from gptcore.train.step import NonFiniteError, update
from gptcore.train.stop import StopRequest

if TYPE_CHECKING:
    from gptcore.train.metrics import MetricsFile


class SpikeError(UserError):
    """A spike that the settings stop for, or that going back has not overcome; the checkpoints are intact."""


class Outcome(NamedTuple):
    """Of an update: what is to be done, and the error that it is where it cannot be.

    ``signal``: by which a rank was asked to stop, 0 for none; ``saved``: whether all ranks' parts of a checkpoint under
    way are through, well or not. Both are the same on all ranks.
    """

    verdict: Verdict
    error: UserError | None
    warning: str | None
    signal: int
    saved: bool


def guarded_update(now: Run, drops: bool, stop: StopRequest) -> Outcome:
    """The next update, what was seen in it and what is to be done; a skipped one counts, but touches no weight.

    ``drops``: keep it from the weights whatever it is like.

    Raises:
        NonFiniteError, SpikeError: where the policy is to stop, or ranks see or decide different things.
    """
    guard = now.guard
    if now.course.due(now.step):
        graphed.renew(now)
    scale = now.scaler.get_scale() if now.scaler is not None else 1.0
    loss, norm, error = _updated(now, drops, stop)
    now.step, now.loss, now.grad_norm = now.step + 1, loss, norm
    seen = guard.look(loss, norm)
    if now.scaler is not None:
        overflowed = error is not None or bool(now.optimizer.found_inf)
        seen += guard.look_at_scale(now.step - 1, scale, now.scaler.get_scale(), overflowed)
    verdict = guard.judge(now.step - 1, loss, norm, seen)
    for sighting in seen:
        if guard.news(sighting):
            now.events.write("seen", now.step, **sighting._asdict())
    # With another update begun the weights are not this one's: it is for the next to stop.
    signal, saved = agree_on_events(now, (now.ahead is None and stop.signal) or 0)
    if drops or verdict.action == "none":
        return Outcome(Verdict(), None, None, signal, saved)
    sentence = _sentence(verdict, seen)
    error = error or SpikeError(f"step {now.step}: {sentence}")
    if verdict.action != "rewind":  # which has more to tell
        now.events.write(
            "decided", now.step, detector=verdict.detector, policy=verdict.action, onset=verdict.onset + 1
        )
    if verdict.action == "skip":
        now.events.write("done", now.step, action="skip")
    if verdict.action == "stop":
        raise error
    return Outcome(verdict, error, sentence, signal, saved)


def _updated(now: Run, drops: bool, stop: StopRequest) -> tuple[float, float | None, UserError | None]:
    """Make the next update: its loss, its norm, and the error if one is not finite."""
    try:
        if now.graphs is not None and not drops:
            return *graphed.update(now, stop), None
        loss = update(
            now.config,
            now.called,
            now.optimizer,
            now.loader,
            now.step,
            routing=now.routing,
            lr=now.course.learning_rate(now.step),
            batch=now.course.batch(now.step),
            admit=_admission(now.guard, drops),
            scaler=now.scaler,
            batches=now.batches,
        )
    except NonFiniteError as error:
        now.writer.wait()  # a checkpoint under way is the last good one, if it comes to be
        error.args = (f"{error}; {_kept(now)}",)
        return error.loss, error.grad_norm, error
    overflowed = now.scaler is not None and now.optimizer.found_inf  # which a smaller scale puts right
    norm = now.optimizer.last_grad_norm  # of a device's gradients a tensor there
    return loss, None if overflowed or norm is None else float(norm), None


def _kept(now: Run) -> str:
    """Which checkpoint the run may go on from."""
    directory = now.directory.checkpoints
    there = checkpoint.steps(directory)
    return f"the checkpoint of step {there[-1]} in {directory} is intact" if there else "no checkpoint yet"


def _admission(guard: Guard, drops: bool) -> Callable[[float, float], bool] | None:
    """What is asked before weights are touched, where somebody may say no."""
    if drops:
        return lambda loss, norm: False
    if guard.decides_before:
        return lambda loss, norm: not guard.skips(guard.look(loss, norm))
    return None


def _sentence(verdict: Verdict, seen: list[Sighting]) -> str:
    """What the detector of ``verdict`` saw."""
    for sighting in seen:
        if sighting.detector != verdict.detector:
            continue
        if sighting.detector == "loss_scale":
            return f"the loss scale has fallen to {sighting.value:g}, from {sighting.usual:g} not long ago"
        if sighting.z is None:
            return "the loss or a gradient is not finite"
        name = {"loss": "the loss", "grad_norm": "the gradient's norm"}[sighting.detector]
        return (
            f"{name} is {sighting.value:.4g}, {sighting.z:.1f} robust standard deviations above "
            f"{sighting.median:.4g}, the median of the updates before"
        )
    return ""


def agree_on_events(now: Run, signal: int) -> tuple[int, bool]:
    """Among several ranks, stop where one saw or decided something else; the largest of their ``signal``, and whether
    all have ended their parts of a checkpoint.

    One exchange for all, since each costs an update the time that it takes.

    Raises:
        SpikeError: on every rank, naming the first that differs from rank 0.
    """
    if not (c10d.is_available() and c10d.is_initialized()):
        return signal, now.writer.ended
    # One NaN for all of them, whatever its bits.
    numbers = (now.loss, now.grad_norm)
    values = [math.nan if x is None or math.isnan(x) else x for x in numbers]
    bits = [struct.unpack("<q", struct.pack("<d", value))[0] for value in values]
    own = [*bits, now.events.digest, signal, now.writer.ended]
    rows = agree("train.run", member_of("train.run"), {}, own=own)
    for rank, row in enumerate(rows):
        for name, mine, theirs in zip(("loss", "gradient norm", "events"), rows[0], row, strict=False):
            if mine != theirs:
                raise SpikeError(
                    f"step {now.step}: rank {rank} has another {name} than rank 0; all ranks must be given the same "
                    "settings, the same start and the mean of all ranks' gradients"
                )
    return max(row[-2] for row in rows), all(row[-1] for row in rows)


def rewind(now: Run, outcome: Outcome, metrics: MetricsFile) -> str | None:
    """Go back to before the spike and pass over the batches up to it; a sentence of what was done.

    A kill at any moment of it loses nothing: until the checkpoint gone back to is written anew, the run resumes
    before the decision and comes to it again.

    Returns:
        None where there is no checkpoint to go back to and the run can go on without.

    Raises:
        ``outcome.error`` where it cannot, or has gone back ``max_rewinds`` times.
    """
    spec, verdict, place = now.config.recovery, outcome.verdict, now.directory.checkpoints
    assert outcome.error is not None
    now.writer.wait()
    spent = now.rewinds >= spec.max_rewinds
    found = None
    if not spent:
        found = opened(now.member, lambda: checkpoints_kept.before(place, verdict.onset, spec.rewind_steps))
    if found is None:
        _stay(now, outcome, spent)
        return None
    end, came_from = now.course.batch(now.step - 1) + 1, now.step
    take_up(now, found)
    graphed.renew(now)
    now.rewinds += 1
    begin = now.course.batch(now.step)
    count = max(spec.skip_batches, end - begin)
    now.events.write(
        "decided", came_from, detector=verdict.detector, policy="rewind", onset=verdict.onset + 1,
        to_step=now.step, skip_batches=count,
    )  # fmt: skip
    step = now.step
    first_alone(now.member, lambda: checkpoints_kept.discard_after(place, step))
    metrics.go_back(now.step, now.directory.undone(now.rewinds))
    now.course.skipped.append((now.step, count))
    now.events.write(
        "done", now.step, action="rewind", from_step=came_from, skip_batches=count, first_batch=begin
    )
    sentence = (
        f"went back from step {came_from} to step {now.step} and skipped the data of {count} updates "
        f"({now.rewinds} of {spec.max_rewinds} times)"
    )
    metrics.write("warning", now.step, text=sentence)
    save(now, metrics)
    return sentence


def _stay(now: Run, outcome: Outcome, spent: bool) -> None:
    """Where going back is not possible: raise, or say so and go on with weights that are finite."""
    verdict, error = outcome.verdict, outcome.error
    assert error is not None
    policy = now.guard.policies[verdict.detector]
    why = f"after {now.rewinds} rewinds" if spent else "no checkpoint to go back to"
    stops = spent or verdict.detector == "non_finite" or policy == "skip"
    now.events.write(
        "decided", now.step, detector=verdict.detector, policy="stop" if stops else "warn", reason=why
    )
    if stops:
        error.args = (f"{error}; {why}",)
        raise error
