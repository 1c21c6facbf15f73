"""The gradients of one flat unit, from the leaves of this rank to the sum over all leaves in its owner's slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.dist.flat_unit import FlatUnit
from gptcore.dist.leaf_sums import LeafSums, Node, OrderedSums, maximal_nodes


class Leaves(NamedTuple):
    """Who has which leaves of an update, and how they come together: each rank has ``each`` of them.

    ``at_once``: each leaf is sent when it is there, so that no rank keeps a whole gradient; else what is left of a
    rank's leaves after summing is sent in the end. ``tree``: leaves are summed in the fixed tree; else each rank adds
    its own in their order, and owners add what comes from the ranks in the ranks' order.
    """

    ranks: int
    each: int
    tree: bool
    at_once: bool

    @property
    def total(self) -> int:
        return self.ranks * self.each

    def of_rank(self, rank: int) -> range:
        """The numbers of a rank's leaves, in the order in which it runs them.

        Where owners get leaves at once they are handed out in turn, so that siblings arrive together and few sums wait.
        Else a rank has neighbours, which it adds up by itself.
        """
        if self.at_once:
            return range(rank, self.total, self.ranks)
        return range(rank * self.each, (rank + 1) * self.each)

    def sent_by(self, rank: int) -> list[Node]:
        """The nodes that are left of a rank's leaves, which are neighbours."""
        if not self.tree:
            return [Node(0, rank)]
        return maximal_nodes(rank * self.each, (rank + 1) * self.each)

    def sums(self) -> LeafSums | OrderedSums:
        return LeafSums() if self.tree else OrderedSums()


class Message(NamedTuple):
    """An exchange of ``gradients`` under way: rank r sends its node ``nodes[r]``, None for nothing, each owner's slice
    to it."""

    gradients: UnitGradients
    work: Any
    sent: Tensor | None
    received: Tensor
    nodes: Sequence[Node | None]


class UnitGradients:
    """Of the trainable parameters of ``unit``; every rank makes the same calls, in the same order of units.

    A buffer that is exchanged as it came keeps the parameters' dtype; sums are f32. ``messages`` are those under way,
    of all units that share the list, at most two: what is on its way takes the memory of two units, not of all.
    """

    def __init__(self, unit: FlatUnit, leaves: Leaves, messages: list[Message]) -> None:
        self.unit, self._leaves, self._messages = unit, leaves, messages
        self._alone = leaves.ranks > 1 and (leaves.at_once or leaves.each == 1)
        self._local, self._owned = leaves.sums(), leaves.sums()
        self._leaf: Tensor | None = None
        self._arrived: set[int] = set()
        self._spare: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether the present leaf has given every parameter's gradient."""
        return len(self._arrived) == len(self.unit.parameters)

    def put(self, number: int, gradient: Tensor) -> None:
        """The gradient of parameter ``number`` in the present leaf."""
        self._place(self._buffer(), number).copy_(gradient.reshape(-1))
        self._arrived.add(number)

    def end_leaf(self, leaf: int) -> None:
        """Leaf number ``leaf`` of this rank's is through; parameters whose gradient did not come have zeros."""
        value, leaves = self._buffer(), self._leaves
        for number in {*range(len(self.unit.parameters))} - self._arrived:
            self._place(value, number).zero_()
        self._leaf, self._arrived = None, set()
        nodes = [Node(0, leaves.of_rank(rank)[leaf]) for rank in range(leaves.ranks)]
        if leaves.at_once or leaves.ranks == 1:
            self._exchange(value, nodes)
            return
        free = self._local.add(nodes[self.unit.member.rank], value)
        self._spare.extend([] if free is None else [free])
        if leaf + 1 == leaves.each:
            self._send_sums()

    def total(self) -> Tensor:
        """(own slice,) f32: the sum over all ranks' leaves."""
        self._receive(keep=0)
        return self._owned.total(self._leaves.total)

    def forget(self) -> None:
        """Drop what has come so far."""
        self._receive(keep=0)
        self._leaf, self._arrived = None, set()
        self._local, self._owned = self._leaves.sums(), self._leaves.sums()

    def _buffer(self) -> Tensor:
        if self._leaf is None:
            dtype = self.unit.dtype if self._alone else torch.float32
            fresh = (
                None if self._spare else torch.zeros(self.unit.numel, dtype=dtype, device=self.unit.device)
            )
            self._leaf = self._spare.pop() if fresh is None else fresh
        return self._leaf

    def _place(self, buffer: Tensor, number: int) -> Tensor:
        offset = self.unit.offsets[number]
        return buffer[offset : offset + self.unit.parameters[number].numel()]

    # --- between ranks ---------------------------------------------------------------------------------------

    def _send_sums(self) -> None:
        nodes = [self._leaves.sent_by(rank) for rank in range(self._leaves.ranks)]
        values = self._local.take()
        for turn in range(max(len(of_rank) for of_rank in nodes)):
            value = values[turn] if turn < len(values) else None
            self._exchange(value, [of_rank[turn] if turn < len(of_rank) else None for of_rank in nodes])

    def _exchange(self, value: Tensor | None, nodes: Sequence[Node | None]) -> None:
        unit = self.unit
        if len(nodes) == 1:
            assert value is not None
            free = self._owned.add(nodes[0] or Node(0, 0), value)
            self._spare.extend([] if free is None else [free])
            return
        self._receive(keep=1)
        own = unit.sizes[unit.member.rank]
        kind = self.unit.dtype if self._alone else torch.float32
        receive = [0 if node is None else own for node in nodes]
        received = torch.empty(sum(receive), dtype=kind, device=unit.device)
        send = [0] * len(nodes) if value is None else unit.sizes
        sent = received[:0] if value is None else value
        work = c10d.all_to_all_single(received, sent, receive, send, group=unit.member.group, async_op=True)
        self._messages.append(Message(self, work, value, received, nodes))

    def _receive(self, *, keep: int) -> None:
        """Take in messages, oldest first, until ``keep`` are under way."""
        while len(self._messages) > keep:
            message = self._messages.pop(0)
            message.work.wait()
            message.gradients._take_in(message)

    def _take_in(self, message: Message) -> None:
        if message.sent is not None:
            if self._leaves.at_once:
                _release(message.sent)
            else:
                self._spare.append(message.sent)
        parts = iter(message.received.split(self.unit.sizes[self.unit.member.rank] or 1))
        for node in message.nodes:
            if node is not None:  # a copy: a view would keep all that was received
                self._owned.add(node, next(parts, message.received).to(torch.float32, copy=True))
        _release(message.received)


def _release(buffer: Tensor) -> None:
    """Give memory back that a thread of the backend may refer to for a while longer."""
    buffer.untyped_storage().resize_(0)
