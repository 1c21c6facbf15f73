"""Bytes that a rank sends in an update, by formula."""

from __future__ import annotations

from typing import NamedTuple

from gptcore.train import partial_sums
from gptcore.train.planned_run import Run


class Traffic(NamedTuple):
    """Bytes a rank sends, and as many that it receives, in one update.

    ``gradients`` once and ``weights`` once (in stage 0 the summed gradients back), as if a rank had one leaf;
    ``unsummed``: subtrees that a rank's leaves leave beside the first; ``per_leaf``: gradients sent, and in stage 3
    weights gathered, for each further leaf. ``formula``: 2 P elements of the weights' type in stages 0 to 2 and 3 P in
    stage 3 (Rajbhandari et al. 2020, section 7), without the share that stays.
    """

    gradients: int
    weights: int
    unsummed: int
    per_leaf: int
    formula: int

    @property
    def total(self) -> int:
        return sum(self) - self.formula


def traffic(run: Run, ranks: int, stage: int) -> Traffic:
    """Of one of ``ranks`` ranks under ZeRO's ``stage``.

    Raises:
        UserError: ranks that do not divide the leaves.
    """
    each, e, n = run.each(ranks), run.element_bytes, run.parameters
    formula = (3 if stage == 3 else 2) * n * e
    if ranks == 1:
        return Traffic(0, 0, 0, 0, formula)
    gradient = n * (e if each == 1 or stage >= 2 else 4)
    unsummed = per_leaf = 0
    if stage < 2:
        subtrees = partial_sums.sent_by_a_rank(ranks, each) if run.fixed_tree else 1
        unsummed = (subtrees - 1) * gradient
        weights = n * (4 if stage == 0 else e)
    else:
        per_leaf = (each - 1) * gradient
        weights = n * e
    if stage == 3:  # blocks come twice for each leaf, forward and backward, the rest once an update
        blocks = (n - run.root) * e
        weights = run.root * e + 2 * blocks
        per_leaf += (each - 1) * 2 * blocks
    sent = (part * (ranks - 1) // ranks for part in (gradient, weights, unsummed, per_leaf))
    return Traffic._make((*sent, formula))
