"""The settings of spike recovery, and the changes of a run under way, as the configuration names them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from gptcore.errors import UserError
from gptcore.models.schema import Spec, at_least


@dataclass(frozen=True)
class RecoverySpec(Spec):
    """What is looked for in each update, and what is done about it; docs/recovery.md explains.

    ``non_finite``, ``loss``, ``grad_norm``, ``loss_scale``: the policy of each detector. ``warn`` says it once;
    ``skip`` drops the update before a weight is touched, at most ``max_skips`` in a row, then rewinds; ``rewind``
    goes back to the newest checkpoint at least ``rewind_steps`` updates before the spike and skips the data from
    there to the spike, those of ``skip_batches`` updates or more (PaLM, section 5.1), at most ``max_rewinds`` times
    in a run; ``stop`` ends the run.

    An outlier lies more than ``threshold`` robust standard deviations above the median of the last ``window`` updates,
    of which there must be ``least``; but for ``skip``, ``patience`` of them in a row make a spike. A loss scale (of
    ``dtype`` float16) has collapsed when it is the ``scale_fall``-th part, or less, of the highest at which one of the
    last ``window`` updates that did not overflow was made (OPT, section 2.5: its runs that diverged showed it first).
    """

    section: ClassVar[str] = "recovery"

    non_finite: Literal["skip", "rewind", "stop"] = "rewind"
    loss: Literal["off", "warn", "skip", "rewind", "stop"] = "warn"
    grad_norm: Literal["off", "warn", "skip", "rewind", "stop"] = "warn"
    loss_scale: Literal["off", "warn", "rewind", "stop"] = "warn"
    threshold: float = 6.0
    window: int = 128
    least: int = 32
    patience: int = 3
    rewind_steps: int = 100
    skip_batches: int = 200
    max_rewinds: int = 3
    max_skips: int = 5
    scale_fall: float = 256.0

    def validate(self) -> None:
        at_least("recovery.", 1.0, threshold=self.threshold)
        at_least("recovery.", 2.0, scale_fall=self.scale_fall)
        at_least("recovery.", 8, window=self.window, least=self.least)
        at_least(
            "recovery.", 1, patience=self.patience, skip_batches=self.skip_batches, max_skips=self.max_skips
        )
        at_least("recovery.", 0, rewind_steps=self.rewind_steps, max_rewinds=self.max_rewinds)
        if self.least > self.window:
            raise UserError(f"recovery.least: {self.least} is more than recovery.window {self.window}")

    @property
    def rewinds(self) -> bool:
        """Whether a detector can ask to go back; ``skip`` does when skipping has not helped."""
        policies = (self.non_finite, self.loss, self.grad_norm, self.loss_scale)
        return any(policy in ("skip", "rewind") for policy in policies)


@dataclass(frozen=True)
class Change(Spec):
    """What changes once ``step`` updates are done: OPT's mid-flight changes (Zhang et al. 2022, section 2.5).

    ``lr``: the rate of the next update; the schedule is rescaled to go through it. ``lr_factor``: by which all
    later rates are multiplied. ``max_norm``: the norm to clip to (0: none). ``optimizer``: ``sgd``, or the run's
    own to go back; see :func:`gptcore.train.recovery_changes.switched`. ``loss_scale``: what dynamic loss scaling
    goes on from, of a run in float16. ``skip_batches``: so many updates' data are passed over. ``drop_update``: the
    next update is computed, but no weight is touched.
    """

    section: ClassVar[str] = "changes"

    step: int = -1
    lr: float | None = None
    lr_factor: float | None = None
    max_norm: float | None = None
    optimizer: Literal["sgd", "adamw", "adam"] | None = None
    loss_scale: float | None = None
    skip_batches: int | None = None
    drop_update: bool | None = None

    def validate(self) -> None:
        if self.step < 0:
            raise UserError("changes: each needs a step, 0 or more: the updates done before it")
        at_least("changes.", 0, lr=self.lr, lr_factor=self.lr_factor, max_norm=self.max_norm)
        at_least("changes.", 1, loss_scale=self.loss_scale, skip_batches=self.skip_batches)
        if self.lr is not None and self.lr_factor is not None:
            raise UserError(f"changes: step {self.step} has both lr and lr_factor; give one of them")
        if not self.parts():
            known = ", ".join(own.name for own in fields(self) if own.name != "step")
            raise UserError(f"changes: step {self.step} changes nothing; give one of {known}")

    def parts(self) -> dict[str, float | str | bool]:
        """What is set besides the step."""
        return {
            name: value for name, value in self.to_dict().items() if name != "step" and value is not False
        }
