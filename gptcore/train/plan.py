"""Bytes per rank of a training run by formula, before anything is allocated.

Under ZeRO (Rajbhandari et al. 2020, section 5) with P parameters on n ranks a rank holds, for mixed-precision Adam,

==  ==============  ==================================================
0   16 P            nothing is divided: data parallel training
1   4 P + 12 P / n  the optimizer's states are
2   2 P + 14 P / n  and gradients
3   16 P / n        and weights
==  ==============  ==================================================

:func:`zero_bytes` is that table. :func:`memory` says what this engine holds: an update's sequences are cut into leaves,
which a rank runs one after the other, and the leaves' gradients are added in f32 in a fixed tree, so partial sums are
alive beside them; activations, buckets, weights gathered for use and what backward needs in passing come on top.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from gptcore.errors import UserError
from gptcore.models.activations import CHECKPOINTING, Moment
from gptcore.train import in_flight, partial_sums
from gptcore.train.planned_run import OFFLOAD, Run

STAGES = (0, 1, 2, 3)


def zero_bytes(
    parameters: float,
    ranks: int,
    stage: int,
    *,
    weight: float = 2.0,
    gradient: float = 2.0,
    state: float = 12.0,
) -> float:
    """Bytes of weights, gradients and optimizer state per rank by the formulas of ZeRO.

    Args:
        weight, gradient, state: bytes a parameter; by default those of Adam in mixed precision, whose state is an f32
            master and two moments.

    Raises:
        ValueError: a stage other than 0 to 3, fewer than 1 rank.
    """
    if stage not in STAGES or ranks < 1:
        raise ValueError(f"zero_bytes: got stage {stage} and {ranks} ranks, expected 0 to 3 and 1 or more")
    divided = sum((state, gradient, weight)[:stage])
    return parameters * (weight + gradient + state - divided + divided / ranks)


class Memory(NamedTuple):
    """Bytes on one rank at the fullest moment of an update, by what they are; ``host`` apart.

    ``gradient`` is that of a rank's only leaf, ``partial_sums`` of leaves, that under way among them, ``summed`` of all
    leaves of all ranks; ``backward`` what backward needs in passing, most of it gradients of activations;
    ``not_at_once`` is negative: gradients come as activations go.
    """

    weights: int
    gathered: int
    gradient: int
    partial_sums: int
    summed: int
    masters: int
    moments: int
    buckets: int
    activations: int
    backward: int
    workspace: int
    not_at_once: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self) - self.host


class _Gradients(NamedTuple):
    """Bytes: of the leaf under way and of sums, whose place is kept from leaf to leaf; ``growing``, a parameter, of
    what backward only makes; ``summed`` over all leaves."""

    leaf: int
    partial: int
    growing: float
    summed: int


class _Resident(NamedTuple):
    """Bytes of what outlives a pass, ``host`` of that in host memory."""

    weights: int
    gathered: int
    masters: int
    moments: int
    host: int


def memory(run: Run, ranks: int, stage: int) -> Memory:
    """Of one of ``ranks`` ranks under ZeRO's ``stage``.

    Raises:
        UserError: ranks that do not divide the leaves; a stage other than 0 to 3.
    """
    if stage not in STAGES:
        raise UserError(f"plan: stage: expected 0 to 3, got {stage}")
    each, stage = run.each(ranks), stage if ranks > 1 else 0
    resident, gradients, act = (
        _resident(run, ranks, stage),
        _gradients(run, ranks, each, stage),
        run.activations,
    )
    moments = _moments(run, gradients, stage)
    buckets = [in_flight.bytes_at(run, ranks, each, stage, moment) for moment in moments]
    growing = round(gradients.growing * run.parameters)
    lines = Memory(
        weights=resident.weights, gathered=resident.gathered, masters=resident.masters, moments=resident.moments,
        gradient=gradients.leaf + growing * (stage < 2), partial_sums=gradients.partial + growing * (stage >= 2),
        summed=gradients.summed, buckets=max(buckets), activations=act.kept + act.again,
        backward=max(0, max(moment.bytes for moment in moments) - act.kept - act.again),
        workspace=act.workspace, not_at_once=0, host=resident.host,
    )  # fmt: skip
    always = sum(resident) - resident.host + gradients.leaf + gradients.partial + act.workspace
    made = [m.parameters if stage < 2 else in_flight.arrived(run, stage, m) for m in moments]
    passing = max(
        moment.bytes + round(gradients.growing * parameters) + on_their_way
        for moment, parameters, on_their_way in zip(moments, made, buckets, strict=True)
    )
    return lines._replace(not_at_once=always + max(passing, growing + gradients.summed) - lines.total)


def _resident(run: Run, ranks: int, stage: int) -> _Resident:
    e = run.element_bytes
    masters, moments = (_share(part, ranks if stage else 1) for part in run.state)
    weights = e * _share(run.parameters, ranks if stage == 3 else 1)
    gathered = e * (run.root + 2 * run.largest_block) if stage == 3 else 0
    host = 0
    if run.offload != "none":  # with a copy of the rank's weights and the f32 sum of their gradients
        own = _share(run.parameters, ranks if stage else 1)
        host, masters, moments = masters + moments + (e + 4) * own, 0, 0
    if run.offload == "parameters" and stage == 3:  # that copy is then the only one
        weights = 0
    return _Resident(weights, gathered, masters, moments, host)


def _gradients(run: Run, ranks: int, each: int, stage: int) -> _Gradients:
    e, n, own = run.element_bytes, run.parameters, 4 * _share(run.parameters, ranks)
    if stage >= 2:
        one_sum = partial_sums.Live(int(each > 1), 1)
        sums = partial_sums.live_in_owners(ranks, each) if run.fixed_tree else one_sum
        return _Gradients(0, sums.waiting * own, 4 * (sums.most - sums.waiting) / ranks, 0)
    if ranks > 1:
        summed = 4 * n if stage == 0 else own
        if each == 1:  # as it was made
            return _Gradients(e * n, 0, 0, summed)
        live = partial_sums.places_on_a_rank(ranks, each).sums if run.fixed_tree else 2
        return _Gradients(0, live * 4 * n, 0, summed)
    if each == 1:
        return _Gradients(0, 0, e, 0)
    if run.fixed_tree:
        return _Gradients(0, partial_sums.places_on_a_rank(1, each).sums * 4 * n, 0, 0)
    # Autograd itself adds to the f32 gradients that are there; those of bf16 have sums beside them.
    return _Gradients(4 * n, 0, 0, 0) if e == 4 else _Gradients(0, 4 * n, e, 0)


def _moments(run: Run, gradients: _Gradients, stage: int) -> list[Moment]:
    """Of a backward pass, with the gradients of weights that wait for their place elsewhere: a parameter's goes there
    as soon as it is made, but a tied head's waits for the embedding's, in stage 3 any for what is outside blocks."""
    moments = list(in_flight.moments(run, stage))
    if stage < 2 and gradients.growing >= run.element_bytes:  # they are in their place
        return moments
    waiting = run.element_bytes * moments[0].parameters
    return [
        moment._replace(bytes=moment.bytes + waiting)
        if run.model.tied_head or stage == 3 or moment.name == "loss"
        else moment
        for moment in moments
    ]


def _share(whole: int, ranks: int) -> int:
    return -(-whole // ranks)


class Fit(NamedTuple):
    """Ranks and stage, and what one rank holds."""

    ranks: int
    stage: int
    memory: Memory


def rank_counts(run: Run) -> list[int]:
    """1, 2, 4, ... as far as they divide the leaves of an update."""
    return [1 << i for i in range(run.leaves.bit_length()) if run.leaves % (1 << i) == 0]


def smallest(run: Run, limit: float) -> tuple[Fit, bool]:
    """The fewest ranks, and on them the lowest stage, whose memory is within ``limit`` bytes, and True; where none is,
    the one that needs least, and False."""
    tried = []
    for ranks in rank_counts(run):
        for stage in STAGES if ranks > 1 else STAGES[:1]:
            fit = Fit(ranks, stage, memory(run, ranks, stage))
            if fit.memory.total <= limit:
                return fit, True
            tried.append(fit)
    return min(tried, key=lambda fit: fit.memory.total), False


def variants(run: Run) -> list[Run]:
    """The run under every kind of checkpointing and offload."""
    return [
        replace(run, checkpointing=checkpointing, offload=offload)
        for checkpointing in CHECKPOINTING
        for offload in OFFLOAD
    ]
