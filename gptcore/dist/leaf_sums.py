"""Sums of leaf gradients in a fixed binary tree, whoever has the leaves.

An update has ``leaves`` leaves, numbered from 0. Node ``(level, place)`` of the tree covers leaves
``place 2^level`` to ``(place + 1) 2^level - 1``, as far as there are so many, and its value is the f32 sum of its two
halves' values. So the root's bits depend on the leaves alone, not on how many ranks there are or which of them added
what.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Node(NamedTuple):
    """The subtree number ``place`` of its level, from the left."""

    level: int
    place: int

    @property
    def sibling(self) -> Node:
        return Node(self.level, self.place ^ 1)

    @property
    def parent(self) -> Node:
        return Node(self.level + 1, self.place // 2)


def maximal_nodes(first: int, stop: int) -> list[Node]:
    """The fewest nodes that make up leaves ``first`` to ``stop - 1``, from left to right."""
    nodes = []
    while first < stop:
        level = (stop - first).bit_length() - 1
        if first:
            level = min(level, (first & -first).bit_length() - 1)
        nodes.append(Node(level, first >> level))
        first += 1 << level
    return nodes


class LeafSums:
    """Values of nodes, added as soon as both halves of a node are there.

    At most ``ceil(log2(leaves)) + 1`` values are kept while one rank's leaves come in order.
    """

    def __init__(self) -> None:
        self._values: dict[Node, Tensor] = {}

    def __len__(self) -> int:
        return len(self._values)

    def add(self, node: Node, value: Tensor) -> Tensor | None:
        """Take an f32 ``value``, which may be written to from now on; gives back one that is free again, if any."""
        free = None
        while (other := self._values.pop(node.sibling, None)) is not None:
            free, value = value, other.add_(value)
            node = node.parent
        self._values[node] = value
        return free

    def take(self) -> list[Tensor]:
        """The values of the maximal nodes, from left to right; none are left here."""
        values, self._values = self._values, {}
        return [values[node] for node in sorted(values, key=lambda node: node.place << node.level)]

    def total(self, leaves: int) -> Tensor:
        """The root's value; nothing is left here.

        Raises:
            RuntimeError: a leaf is missing.
        """
        values, self._values = self._values, {}
        root = _value(Node((leaves - 1).bit_length(), 0), leaves, values)
        if root is None or values:
            raise RuntimeError(f"LeafSums: got other leaves than 0 to {leaves - 1}")
        return root


class OrderedSums:
    """As :class:`LeafSums`, but one sum to which everything is added as it comes."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def __len__(self) -> int:
        return int(self._sum is not None)

    def add(self, node: Node, value: Tensor) -> Tensor | None:
        """Take ``value``, which may be written to from now on; gives it back where it is free again."""
        if self._sum is None:
            self._sum = value
            return None
        self._sum.add_(value)
        return value

    def take(self) -> list[Tensor]:
        """The sum, if any; nothing is left here."""
        values, self._sum = [] if self._sum is None else [self._sum], None
        return values

    def total(self, leaves: int) -> Tensor:
        """The sum; nothing is left here."""
        (value,) = self.take()
        return value


def _value(node: Node, leaves: int, values: dict[Node, Tensor]) -> Tensor | None:
    """A node's value out of ``values``, which loses what it is made of; None where no leaf is in it."""
    if node in values:
        return values.pop(node)
    if node.place << node.level >= leaves:
        return None
    if node.level == 0:
        raise RuntimeError(f"LeafSums: got no gradient of leaf {node.place}")
    left = _value(Node(node.level - 1, 2 * node.place), leaves, values)
    right = _value(Node(node.level - 1, 2 * node.place + 1), leaves, values)
    if left is None or right is None:
        return left
    return left.add_(right)
