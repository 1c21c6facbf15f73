"""Bytes of gradients on their way between ranks, at a moment of a backward pass.

Gradients are sent by flat units, in the reverse of the model's order: a bucket, in stage 3 a block and then buckets of
what is outside the blocks. Two messages are under way at a time. They arrive in buffers of their own; from stage 2 on
what is sent has one of its own too, and the unit that is being filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from gptcore.models.activations import Moment
from gptcore.train import partial_sums
from gptcore.train.planned_run import Run


class Units(NamedTuple):
    """Elements of a ``usual`` unit, of the ``head`` where it is one by itself that goes first, of the ``last`` two."""

    usual: int
    head: int
    last: int

    @classmethod
    def of(cls, run: Run, stage: int) -> Units:
        table = run.model.vocab_size * run.model.table_width
        if stage == 3:
            beside = min(run.bucket, run.root - table) if run.root > run.bucket else run.largest_block
            return cls(run.largest_block, 0, (table if run.root > run.bucket else run.root) + beside)
        usual = min(run.parameters, run.bucket)
        head = 0 if run.model.tied_head or table <= usual else table
        return cls(usual, head, min(run.parameters, max(table, usual) + usual))


def bytes_at(run: Run, ranks: int, each: int, stage: int, moment: Moment) -> int:
    """In buffers of messages and of a unit that has no other place, at most in the last of a rank's ``each`` leaves."""
    units = Units.of(run, stage)
    sent = min(2, _made(run, moment) // units.usual)
    over = moment.parameters == run.parameters
    if stage >= 2:
        before = (
            (units.last if each > 1 else 2 * units.head) * (2 - sent) // 2
        )  # of the leaf before, or the head
        under_way = units.last if over else sent * units.usual + before
        return run.element_bytes * (2 * under_way + (0 if over else units.usual))
    filled = run.fixed_tree and partial_sums.places_on_a_rank(ranks, each).more
    arriving = (units.last if over else max(sent * units.usual, units.head)) if ranks > 1 else 0
    return arriving * (run.element_bytes if each == 1 else 4) + 4 * filled * units.usual


def arrived(run: Run, stage: int, moment: Moment) -> int:
    """Parameters whose gradients have come to their owners."""
    units = Units.of(run, stage)
    if moment.parameters == run.parameters:
        return run.parameters - units.last
    return max(0, _made(run, moment) // units.usual - 2) * units.usual


def _made(run: Run, moment: Moment) -> int:
    """Parameters whose gradients are in units; a tied head's waits for the embedding's."""
    return moment.parameters - run.activations.moments[0].parameters


def moments(run: Run, stage: int) -> Iterator[Moment]:
    """Those of a backward pass at which memory may be fullest, with the feed-forward after two units have been sent."""
    known = run.activations.moments
    full = known[1].parameters + 2 * Units.of(run, stage).usual
    for a, b in pairwise(known):
        yield a
        if a.parameters < full < b.parameters:
            fallen = (a.bytes - b.bytes) * (full - a.parameters) // (b.parameters - a.parameters)
            yield Moment("two sent", a.bytes - fallen, full)
    yield known[-1]
