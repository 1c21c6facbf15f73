"""Changes of a run under way: learning rate, clip, optimizer, loss scale, data, each at its step (OPT, section 2.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gptcore.errors import UserError
from gptcore.optim.divided import Divided
from gptcore.optim.fused import FusedOptimizer
from gptcore.optim.sgd import SGD
from gptcore.train.config import TrainConfig
from gptcore.train.recovery_spec import Change
from gptcore.train.state import saved_state

if TYPE_CHECKING:
    from gptcore.train.run_state import Run

# What Adam calls its mean of gradients, and SGD its own.
_NAMES = {"exp_avg": "momentum_buffer"}


class Course:
    """Where a run has left the way its settings lay out: changes that were applied, batches that were skipped.

    ``skipped`` has (updates done, batches): before which update how many updates' data were passed over.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.applied: list[Change] = []
        self.skipped: list[tuple[int, int]] = []
        self._planned = list(config.changes)

    def due(self, step: int) -> list[Change]:
        """The changes to apply before the update with zero-based index ``step``."""
        return [change for change in self._planned if change.step == step]

    def batch(self, step: int) -> int:
        """The index of the update whose data the update ``step`` takes."""
        return step + sum(count for _, count in self.skipped)

    def learning_rate(self, step: int) -> float:
        """The schedule's rate at ``step`` under the changes applied."""
        factor = 1.0
        for change in self.applied:
            if change.lr is not None:
                factor = change.lr / self.scheduled(change)
            factor *= 1.0 if change.lr_factor is None else change.lr_factor
        return self.config.learning_rate(step) * factor

    def scheduled(self, change: Change) -> float:
        """The schedule's own rate where ``change`` comes. Raises UserError where it is 0 and cannot be rescaled."""
        rate = self.config.learning_rate(change.step)
        if rate <= 0:
            raise UserError(f"changes: step {change.step}: lr cannot rescale the schedule, which is 0 there")
        return rate

    @property
    def optimizer(self) -> str:
        """The optimizer's name after the changes applied."""
        return self._last("optimizer", self.config.optimizer.name)

    @property
    def max_norm(self) -> float | None:
        """What gradients are clipped to after the changes applied."""
        return self._last("max_norm", self.config.optimizer.max_norm) or None

    def _last(self, name: str, otherwise: Any) -> Any:
        given = [value for change in self.applied if (value := getattr(change, name)) is not None]
        return given[-1] if given else otherwise

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON."""
        return {
            "applied": [change.to_dict() for change in self.applied],
            "skipped": [list(pair) for pair in self.skipped],
        }

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where ``state`` was taken, after ``step`` updates; planned changes from there on are still to come.

        Raises:
            UserError: the settings have a change before ``step`` that the run did not make.
        """
        self.applied = [Change.from_dict(table) for table in state["applied"]]
        self.skipped = [(at, count) for at, count in state["skipped"]]
        for change in self._planned:
            if change.step < step and change not in self.applied:
                raise UserError(
                    f"changes: step {change.step} is over, the run goes on at step {step}; "
                    "give a later step, or take the change out"
                )


def check(config: TrainConfig) -> None:
    """Refuse changes that the run of ``config`` cannot make, before it begins.

    Raises:
        UserError: an optimizer that cannot be switched, a loss scale where there is none, a schedule of rate 0.
    """
    course = Course(config)
    for change in config.changes:
        where = f"changes: step {change.step}"
        own = config.optimizer.name
        if change.optimizer is not None and (
            own not in ("adam", "adamw") or change.optimizer not in ("sgd", own)
        ):
            raise UserError(
                f"{where}: optimizer {change.optimizer}: a run with Adam or AdamW can change to sgd and back; "
                f"this one has {own}"
            )
        if change.loss_scale is not None:
            _check_scale(where, change.loss_scale, config)
        if change.lr is not None:
            course.scheduled(change)


def _check_scale(where: str, scale: float, config: TrainConfig) -> None:
    if config.dtype != "float16":
        raise UserError(f"{where}: loss_scale: {config.dtype} is trained without a loss scale")
    try:
        config.loss_scale.build().restart(scale)
    except ValueError as error:
        raise UserError(f"{where}: loss_scale: {error}") from error


def apply_due(now: Run) -> bool:
    """Apply and log what is due before the next update; tells whether that update is to be dropped."""
    drops, due = False, now.course.due(now.step)
    for change in due:
        now.course.applied.append(change)
        if change.skip_batches is not None:
            now.course.skipped.append((now.step, change.skip_batches))
        if change.loss_scale is not None and now.scaler is not None:
            now.scaler.restart(change.loss_scale)
            now.guard.scales.restore(())  # what was usual before says nothing now
        drops = drops or bool(change.drop_update)
        now.events.write("done", now.step, action="change", **change.parts())
    if due:
        adjust(now)
    return drops


def adjust(now: Run) -> None:
    """Give the run the optimizer and the clip that its course has come to."""
    inner = now.optimizer.optimizer if isinstance(now.optimizer, Divided) else now.optimizer
    if (now.course.optimizer == "sgd") != isinstance(inner, SGD):
        inner = switched(inner, now.config)
        if isinstance(now.optimizer, Divided):
            now.optimizer.exchange(inner)
        else:
            now.optimizer = inner
    inner.max_norm = now.course.max_norm


def switched(optimizer: FusedOptimizer, config: TrainConfig) -> FusedOptimizer:
    """From the Adam that ``config`` names to SGD, or back, the state carried over.

    SGD has momentum and dampening beta1, so that its buffer b = beta1 b + (1 - beta1) g is Adam's first moment, which
    it takes over and gives back as it is. Its weight decay is Adam's, as L2 through the same mean: lr times decay
    times the weight each update, in the long run, as AdamW's is. The second moment and Adam's step count stay in the
    state and in checkpoints, unused, and go on where they were: the count belongs to the second moment, whose bias it
    corrects; that of the first is gone after some tens of updates. An Adam that had made no step begins as it would
    have. Masters are kept, split ones made whole for SGD.
    """
    saved = saved_state(optimizer)  # with whole masters
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups
    ]
    other: FusedOptimizer
    if isinstance(optimizer, SGD):
        other = config.optimizer.over(groups)
        names = {new: old for old, new in _NAMES.items()}
    else:
        beta1 = optimizer.param_groups[0]["betas"][0]
        other = SGD(groups, momentum=beta1, dampening=beta1, max_norm=optimizer.max_norm)
        names = _NAMES
    for p, values in saved.items():
        state = {names.get(name, name): value for name, value in values.items()}
        if "exp_avg" in state and "exp_avg_sq" not in state:  # SGD from the first update on
            zeros = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            state |= {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        other.state[p] = state
    return other
