"""Backward passes under ZeRO: gradients go into units as autograd makes them, and from there to their owners."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from gptcore.dist.flat_unit import FlatUnit
from gptcore.dist.group import Member
from gptcore.dist.unit_gradients import Leaves, Message, UnitGradients
from gptcore.optim.zero_layout import Layout


class Backward:
    """The leaves of a step. ``wanted`` says who has which leaves of the next one."""

    def __init__(self, layout: Layout, member: Member, wanted: Callable[[], Leaves]) -> None:
        self._layout, self._member, self._wanted = layout, member, wanted
        self._gradients: list[UnitGradients] = []
        self._leaves = wanted()
        self.begin_step()
        for p in layout.places:
            p.register_post_accumulate_grad_hook(self._arrived)

    def begin_step(self) -> None:
        """Nothing has come yet."""
        self.done = 0  # backward passes that are through
        self._open = False  # whether one is under way
        self._next = 0  # the unit that is to end it next
        self._used: set[nn.Parameter] = set()
        leaves = self._wanted()
        if not self._gradients or leaves != self._leaves:
            self._leaves = leaves
            messages: list[Message] = []
            self._gradients = [UnitGradients(unit, leaves, messages) for unit in self._layout.units]

    def forget(self) -> None:
        """Drop what has come since the last step; all ranks call it."""
        if self.done:
            for gradients in self._gradients if self._leaves.total > 1 else []:
                gradients.forget()
            self.begin_step()

    # --- called by autograd ----------------------------------------------------------------------------------

    def _arrived(self, p: nn.Parameter) -> None:
        """A parameter's gradient of this leaf is in place."""
        if not self._open:
            self._begin_leaf()
        self._used.add(p)
        if self._leaves.total == 1:
            return  # nothing is added to it: it is used where it lies
        unit, number = self._layout.places[p]
        assert p.grad is not None
        self._gradients[unit].put(number, p.grad)
        p.grad = None
        # In the order of units on every rank, whatever the order in which they are complete.
        while self._next < len(self._gradients) and self._gradients[self._next].complete:
            self._end_unit()

    def _begin_leaf(self) -> None:
        wanted = self._wanted()
        if self.done == wanted.each:
            raise RuntimeError(
                f"ZeroOptimizer: got backward pass {self.done + 1} of a step, expected {wanted.each}; "
                "call step, or set accumulation"
            )
        if self.done == 0 and self._leaves != wanted:
            self.begin_step()
        self._open = True
        torch.autograd.Variable._execution_engine.queue_callback(self._end_leaf)

    def _end_unit(self) -> None:
        self._gradients[self._next].end_leaf(self.done)
        if self._layout.weights is not None:
            self._layout.weights.has_gradients(self._layout.units[self._next])
        self._next += 1

    def _end_leaf(self) -> None:
        """A backward pass is through."""
        while self._next < len(self._gradients) and self._leaves.total > 1:
            self._end_unit()
        if self._layout.weights is not None:
            self._layout.weights.backward_ends()
        self._open, self._next = False, 0
        self.done += 1

    # --- sums ------------------------------------------------------------------------------------------------

    def sums(self) -> dict[Tensor, Tensor]:
        """Over all leaves, of the optimizer's parts whose parameter some leaf of some rank used; all ranks call it."""
        used, layout = self._used_anywhere(), self._layout
        if self._leaves.total == 1:
            return {part: _taken(p.grad) for part, p in layout.wholes() if p.grad is not None}
        of_units = []
        for unit, gradients in zip(layout.units, self._gradients, strict=True):
            own = gradients.total()
            of_units.append((self._whole(unit, own), 0) if layout.stage == 0 else (own, unit.low))
        found: dict[Tensor, Tensor] = {}
        for part, p in layout.wholes():
            if p in used:
                place, piece = layout.pieces[part]
                values, low = of_units[place.unit]
                found[part] = values[piece.at - low : piece.at - low + part.numel()]
        return found

    def _whole(self, unit: FlatUnit, own: Tensor) -> Tensor:
        """All ranks' slices of a gradient."""
        if self._member.ranks == 1:
            return own
        whole = own.new_empty(unit.numel)
        whole[unit.low : unit.low + len(own)] = own
        unit.exchange_slices(whole)
        return whole

    def _used_anywhere(self) -> set[nn.Parameter]:
        places, member = self._layout.places, self._member
        if member.ranks == 1 or not places:
            return self._used
        flags = torch.tensor([p in self._used for p in places], dtype=torch.int32)
        c10d.all_reduce(flags, op=c10d.ReduceOp.MAX, group=member.group)
        return {p for p, flag in zip(places, flags.tolist(), strict=True) if flag}


def _taken(gradient: Tensor) -> Tensor:
    """As the kernels take it, which have no f16."""
    flat = gradient.reshape(-1)
    return flat.float() if flat.dtype == torch.float16 else flat
