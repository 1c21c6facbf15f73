"""The settings of learning from preferences without a reward model: the ``[preference]`` table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptcore.errors import UserError
from gptcore.models.schema import Spec, at_least

# Losses of whole answers against a reference; the others average over tokens and need none.
REFERENCED = ("dpo", "ipo", "kto")
_BETA = {"simpo": 2.0}


@dataclass(frozen=True)
class PreferenceSpec(Spec):
    """What is learnt from pairs (of ``kto``: from answers that are good or bad), and by which loss.

    ``loss_type``: dpo (with ``label_smoothing`` above 0 conservative DPO), ipo, kto, orpo, simpo; see
    ``gptcore.align.losses.preference``. ``beta`` None: 0.1, simpo's 2. ``gamma`` is simpo's margin; the weights are
    kto's. ``files`` of pairs or rankings, whose best and worst answers are taken; ``template`` as for ``[sft]``.
    ``epochs`` where ``steps`` are not given. ``data.batch`` counts pairs, or answers.
    """

    section: ClassVar[str] = "preference"

    files: tuple[str, ...] = ()
    template: str = "auto"
    loss_type: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    epochs: float = 1.0

    def validate(self) -> None:
        at_least("preference.", 0.0, gamma=self.gamma, desirable_weight=self.desirable_weight)
        at_least("preference.", 0.0, undesirable_weight=self.undesirable_weight)
        if self.beta is not None and not 0.0 < self.beta < float("inf"):
            raise UserError(f"preference.beta: expected above 0, got {self.beta}")
        if not 0.0 < self.epochs < float("inf"):
            raise UserError(f"preference.epochs: expected above 0, got {self.epochs}")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"preference.label_smoothing: expected at least 0 and below 0.5, got {self.label_smoothing}"
            )
        if self.label_smoothing and self.loss_type not in ("dpo", "simpo"):
            raise UserError(f"preference.label_smoothing: {self.loss_type} does not have it (dpo, simpo)")

    @property
    def strength(self) -> float:
        """``beta``, or the loss's own."""
        return _BETA.get(self.loss_type, 0.1) if self.beta is None else self.beta

    @property
    def referenced(self) -> bool:
        """Whether the loss needs log-probabilities of a reference."""
        return self.loss_type in REFERENCED
