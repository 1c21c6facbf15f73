"""The settings of a reward model: the ``[reward]`` table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptcore.errors import UserError
from gptcore.models.schema import Spec, at_least


@dataclass(frozen=True)
class RewardSpec(Spec):
    """What is learnt from rankings, and how.

    ``files`` of rankings; ``references`` of demonstrations, whose mean score becomes 0 (without: the best answers to
    held-out prompts); ``template`` as for ``[sft]``. ``epochs`` where ``steps`` are not given. ``data.batch`` counts
    prompts, with all their answers. ``margin`` is asked of every pair; ``margins`` adds those of the data. ``centring``
    weighs the square of a pair's summed scores. ``ties``: half a win for either, or no pair. ``members`` of an
    ensemble, each from its own seed and, with ``folds``, without one of so many parts of the prompts (0: all see all).
    """

    section: ClassVar[str] = "reward"

    files: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    template: str = "auto"
    epochs: float = 1.0
    margin: float = 0.0
    margins: bool = True
    centring: float = 0.0
    ties: Literal["half", "skip"] = "half"
    members: int = 1
    folds: int = 0

    def validate(self) -> None:
        at_least("reward.", 0.0, margin=self.margin, centring=self.centring)
        at_least("reward.", 1, members=self.members)
        at_least("reward.", 0, folds=self.folds)
        if not 0.0 < self.epochs < float("inf"):
            raise UserError(f"reward.epochs: expected above 0, got {self.epochs}")
        if self.folds == 1:
            raise UserError("reward.folds: 1 fold leaves nothing to learn from; expected 0 or at least 2")
