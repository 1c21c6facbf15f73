"""Parameters side by side in one flat buffer, cut into a slice for each rank.

Every parameter begins, and every slice ends, at a multiple of ``BLOCK`` elements, whatever the number of ranks:
blocks of 8-bit state and of sums of squares are never cut. Padding is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from gptcore.dist.group import Member

BLOCK = 1024


class Piece(NamedTuple):
    """Elements ``start`` to ``stop - 1`` of parameter number ``number`` of a unit, at ``at`` in its flat buffer."""

    number: int
    start: int
    stop: int
    at: int


class FlatUnit:
    """``parameters`` of one dtype and device; their storage is the unit's ``flat`` from now on.

    ``own`` is this rank's slice of the weights. While ``freed`` nothing else of them is there, and the parameters
    must not be touched until :meth:`gather`.

    Args:
        parameters: each once, contiguous.
        member: whose ranks share it.
        cut_step: elements between the places at which a parameter may be cut, a multiple of 256.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        member: Member,
        cut_step: Callable[[nn.Parameter], int] = lambda _: BLOCK,
    ) -> None:
        self.parameters = list(parameters)
        self.member = member
        first = self.parameters[0]
        self.dtype, self.device = first.dtype, first.device
        self.offsets: list[int] = []
        end = 0
        for p in self.parameters:
            self.offsets.append(end)
            end += _up(p.numel(), BLOCK)
        steps = [cut_step(p) for p in self.parameters]
        even = all(step == BLOCK for step in steps)
        self.numel = _up(end, BLOCK * member.ranks) if even else end
        self.bounds = [self._cut(self.numel * rank // member.ranks, steps) for rank in range(member.ranks)]
        self.bounds.append(self.numel)
        self.sizes = [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        self._move_in(torch.zeros(self.numel, dtype=self.dtype, device=self.device))
        self._own: Tensor | None = None
        self._work: list[Any] = []

    def _cut(self, ideal: int, steps: list[int]) -> int:
        """The first place from ``ideal`` on at which a slice may end."""
        for offset, p, step in zip(self.offsets, self.parameters, steps, strict=True):
            end = offset + _up(p.numel(), BLOCK)
            if offset <= ideal < end:
                return min(offset + _up(ideal - offset, step), end)
        return _up(ideal, BLOCK)

    @torch.no_grad()
    def _move_in(self, flat: Tensor) -> None:
        self.flat = flat
        for p, offset in zip(self.parameters, self.offsets, strict=True):
            place = self.flat[offset : offset + p.numel()].view(p.shape)
            place.copy_(p)
            p.data = place

    # --- slices ----------------------------------------------------------------------------------------------

    def pieces(self, rank: int | None = None) -> list[Piece]:
        """The parts of parameters in a rank's slice (this rank's), without padding."""
        rank = self.member.rank if rank is None else rank
        return self._pieces(self.bounds[rank], self.bounds[rank + 1])

    def all_pieces(self) -> list[Piece]:
        """The parameters, without padding."""
        return self._pieces(0, self.numel)

    def _pieces(self, low: int, high: int) -> list[Piece]:
        found = []
        for number, (offset, p) in enumerate(zip(self.offsets, self.parameters, strict=True)):
            start, stop = max(low - offset, 0), min(high - offset, p.numel())
            if start < stop:
                found.append(Piece(number, start, stop, offset + start))
        return found

    @property
    def low(self) -> int:
        """Where this rank's slice begins."""
        return self.bounds[self.member.rank]

    @property
    def high(self) -> int:
        """Where this rank's slice ends."""
        return self.bounds[self.member.rank + 1]

    @property
    def own(self) -> Tensor:
        """This rank's slice of the weights, (sizes[rank],)."""
        if self._own is not None:
            return self._own
        return self.flat[self.low : self.high]

    # --- weights come and go ---------------------------------------------------------------------------------

    @property
    def freed(self) -> bool:
        return self.flat.untyped_storage().size() == 0

    def keep_own_apart(self) -> None:
        """Own slice in storage of its own, so that the rest may be freed."""
        if self._own is None:
            self._own = self.own.clone()

    def free(self) -> None:
        """Give the storage of all weights back but this rank's."""
        self.wait()
        self.keep_own_apart()
        if not self.flat.untyped_storage().resizable():  # somebody has it as a NumPy array, who may keep it
            self._move_in(torch.empty_like(self.flat))
        self.flat.untyped_storage().resize_(0)

    def start_gather(self) -> None:
        """Begin to fill ``flat`` from all ranks' slices; every rank calls it, in the same order of units."""
        if self._work:
            return
        if self.freed:
            self.flat.untyped_storage().resize_(self.numel * self.flat.element_size())
        if self._own is not None:
            self.flat[self.low : self.low + len(self._own)] = self._own
        self._work = self._broadcasts(self.flat)

    def gather(self) -> None:
        """Fill ``flat`` where that was not begun, and wait until it is there."""
        if self.freed:
            self.start_gather()
        self.wait()

    def wait(self) -> None:
        work, self._work = self._work, []
        for one in work:
            one.wait()

    def exchange_slices(self, values: Tensor) -> None:
        """Of ``values`` (numel,) each rank has its slice; all have all afterwards."""
        for one in self._broadcasts(values):
            one.wait()

    def _broadcasts(self, values: Tensor) -> list[Any]:
        # A rank's slice straight to its place: neither a second buffer nor slices of one size are needed.
        if self.member.ranks == 1:
            return []
        parts, group = values.split(self.sizes), self.member.group
        return [
            c10d.broadcast(part, c10d.get_global_rank(group, rank), group=group, async_op=True)
            for rank, part in enumerate(parts)
            if part.numel()
        ]


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
