"""An iteration of reinforcement learning shared by processes: who asks which prompts, who learns from which responses.

Each process asks its share of the prompts. What came back, O(B·T) numbers, is gathered on all of them, so statistics
over an iteration, its shuffles and the adaptive weight of the divergence are what one process has, bit for bit. An
update's responses are cut into leaves, each through forward and backward by itself on one of the processes; the losses
of leaves add up to the update's, and so do their gradients (``gptcore.optim.ZeroOptimizer``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as c10d
from numpy.typing import NDArray
from torch import Tensor

from gptcore.align.policy import token_batches
from gptcore.dist import Member
from gptcore.errors import UserError
from gptcore.optim import ZeroOptimizer
from gptcore.optim.fused import FusedOptimizer
from gptcore.train import processes
from gptcore.train.config import ParallelSpec
from gptcore.train.sharding import Optimizer

Value = TypeVar("Value")


class Leaf(NamedTuple):
    """Leaf ``number`` of an update: the responses at ``rows`` of it, whose loss counts ``weight`` times: 1, or 0 where
    an update has fewer responses than processes and one of them only keeps the others company."""

    number: int
    rows: NDArray[np.int64]
    weight: float


@dataclass(frozen=True)
class Shares:
    """This process's part in a run. ``grain``: responses of a leaf, whoever has it; 0: as many as fit."""

    member: Member
    parallel: ParallelSpec
    grain: int = 0

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.member.rank == 0

    def optimizer(self, optimizer: FusedOptimizer, module: torch.nn.Module) -> Optimizer:
        """``optimizer``, or around it one that adds the leaves of all processes."""
        spec = self.parallel
        if self.member.ranks == 1 and not spec.zero and not self.grain:
            return optimizer
        return ZeroOptimizer(
            optimizer, stage=spec.zero, module=module, group=self.member.group, fixed_tree=spec.in_fixed_tree
        )

    def prompts(self, count: int) -> range:
        """Which of an iteration's ``count`` prompts this process asks: neighbours, as many as the others or one more.

        Raises:
            UserError: fewer prompts than processes.
        """
        rank, ranks = self.member.rank, self.member.ranks
        if count < ranks:
            raise UserError(
                f"an iteration's {count} prompts are not enough for {ranks} processes; ask more of them"
            )
        return range(rank * count // ranks, (rank + 1) * count // ranks)

    def numbers(self, count: int) -> range:
        """Which of ``count`` leaves are this process's; ``count`` is a multiple of the processes."""
        rank, ranks = self.member.rank, self.member.ranks
        assert count % ranks == 0
        if self.parallel.zero >= 2:  # whose owners get every leaf at once
            return range(rank, count, ranks)
        return range(rank * count // ranks, (rank + 1) * count // ranks)

    def leaves(self, lengths: NDArray[np.int32], max_tokens: int) -> list[Leaf]:
        """This process's leaves of an update whose sequences have ``lengths`` tokens, as many as every other has.

        A leaf is ``grain`` sequences or, where that is 0, as many as have together at most ``max_tokens`` tokens.

        Raises:
            UserError: a ``grain`` whose leaves the processes do not divide.
        """
        parts, ranks = self._parts(lengths, max_tokens), self.member.ranks
        if len(parts) % ranks:
            raise UserError(
                f"grain: {self.grain} responses of {len(lengths)} make {len(parts)} leaves, which {ranks} processes do "
                "not divide; change grain, minibatch or the number of processes"
            )
        return [
            Leaf(number, parts[number], 1.0)
            if len(parts[number])
            else Leaf(number, np.zeros(1, np.int64), 0.0)
            for number in self.numbers(len(parts))
        ]

    def _parts(self, lengths: NDArray[np.int32], max_tokens: int) -> list[NDArray[np.int64]]:
        places, ranks = np.arange(len(lengths)), self.member.ranks
        if self.grain:
            return np.split(places, range(self.grain, len(places), self.grain))
        if ranks == 1:
            return list(token_batches(lengths, max_tokens))
        count = ranks * max(1, math.ceil(int(lengths.sum()) / max_tokens / ranks))
        while True:
            parts = np.array_split(places, count)
            if all(len(part) < 2 or int(lengths[part].sum()) <= max_tokens for part in parts):
                return parts
            count += ranks

    # --- between processes ------------------------------------------------------------------------------------

    def of_all(self, work: Callable[[], Value]) -> list[Value]:
        """What ``work`` gives on each process, on all of them; an error on one ends all.

        Raises:
            what ``work`` raises, where it does; UserError, which names the rank, elsewhere.
        """
        if self.member.ranks == 1:
            return [work()]
        error: Exception | None = None
        own: tuple[str | None, Value | None] = (None, None)
        try:
            own = (None, work())
        except Exception as caught:
            error, own = caught, (str(caught) or type(caught).__name__, None)
        found = self.gathered(own)
        if error is not None:
            raise error
        for rank, (sentence, _) in enumerate(found):
            if sentence is not None:
                raise UserError(f"rank {rank}: {sentence}")
        return [value for _, value in found]  # type: ignore[misc]

    def gathered(self, own: Value) -> list[Value]:
        """Every process's value, by rank; all call it."""
        return processes.of_each(self.member, own)

    def total(self, own: Tensor) -> Tensor:
        """The sum over processes of a tensor that each has, in the order of ranks: the same bits on all."""
        if self.member.ranks == 1:
            return own
        parts = own.new_empty(self.member.ranks, *own.shape)
        c10d.all_gather(list(parts.unbind()), own.contiguous(), group=self.member.group)
        first, *others = parts.unbind()
        for part in others:
            first += part
        return first

    def sums(self, own: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
        """Named numbers of this process's leaves, given with the leaves' numbers, added up over all leaves in order."""
        found = sorted((pair for part in self.gathered(list(own)) for pair in part), key=lambda pair: pair[0])
        sums: dict[str, float] = {}
        for _, numbers in found:
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums


ALONE = Shares(Member(None, 0, 1), ParallelSpec())  # one process, which has everything


def shares_of(parallel: ParallelSpec, grain: int) -> Shares:
    """This process's part in a run with these settings, among those that torch.distributed knows.

    Raises:
        UserError: settings under which no process has all weights, with which it could not sample.
    """
    member = processes.member()
    if parallel.zero == 3:
        raise UserError("parallel.zero: 3 divides the weights, and sampling wants them whole; use 2")
    if parallel.strategy != "zero" and member.ranks > 1:
        raise UserError(
            f"parallel.strategy: learning from rewards is shared by zero alone, got {parallel.strategy}; leave it out"
        )
    return Shares(member, parallel, grain)


def begin(optimizer: Optimizer, passes: int) -> None:
    """Forget gradients; ``passes`` backward passes of this process come before the next step."""
    optimizer.zero_grad()
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.accumulation = passes


def accumulate(optimizer: Optimizer) -> None:
    """After each of several backward passes; ZeRO takes every one as it comes."""
    if isinstance(optimizer, FusedOptimizer):
        optimizer.accumulate()


def step(optimizer: Optimizer) -> None:
    """Update by the sum of all leaves' gradients, since their losses add up to the update's."""
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.step(grad_scale=1.0 / optimizer.member.ranks)  # it divides by their number
    else:
        optimizer.step()
