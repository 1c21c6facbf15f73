"""How many gradients are alive at once where those of leaves are summed in a fixed binary tree.

Leaf i is node (0, i); two siblings are added as soon as both are there. Each rank has ``each`` leaves, which it runs in
order: in stages 0 and 1 neighbours, of which it makes sums itself, from stage 2 on every ``ranks``-th.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple


class Places(NamedTuple):
    """``sums``: the most that wait for a sibling at a time, with the place of one that was added, which the next leaf
    takes. ``more``: whether a leaf comes when all these are taken: it is added at once, bucket by bucket."""

    sums: int
    more: bool


@functools.lru_cache(maxsize=256)
def places_on_a_rank(ranks: int, each: int) -> Places:
    """What one rank has room for, of its own leaves: at most ceil(log2 leaves) + 1 in all."""
    if each & (each - 1) == 0:  # whole subtrees: all ranks are alike
        return _places(range(each))
    of_ranks = [_places(range(rank * each, (rank + 1) * each)) for rank in range(ranks)]
    return max(of_ranks, key=lambda places: places.sums + places.more)


class Live(NamedTuple):
    """Sums of all ranks' leaves at once: ``waiting`` while a leaf's backward pass begins, ``most`` when one is over."""

    waiting: int
    most: int


@functools.lru_cache(maxsize=256)
def live_in_owners(ranks: int, each: int) -> Live:
    """Of which each owner has its slice where leaf ``turn ranks + rank`` is sent when it is there: in a row, the next
    one of every rank, so that at most ceil(log2 leaves) + 1 wait."""
    nodes = _Nodes()
    counts = [0]
    for turn in range(each):
        for rank in range(ranks):
            nodes.add(turn * ranks + rank)
        counts.append(len(nodes))
    return Live(max(counts[:-1]), max(counts))


@functools.lru_cache(maxsize=256)
def sent_by_a_rank(ranks: int, each: int) -> int:
    """The most sums that one rank is left with and sends."""
    return max(_left(rank * each, (rank + 1) * each) for rank in range(ranks))


def _places(leaves: Iterable[int]) -> Places:
    nodes = _Nodes()
    sums = with_leaf = 0
    for leaf in leaves:
        before = len(nodes)
        with_leaf = max(with_leaf, before + 1)
        nodes.add(leaf)
        was_added = len(nodes) <= before
        sums = max(sums, len(nodes) + was_added)
    return Places(sums, with_leaf > sums)


class _Nodes:
    """(level, index) of those whose sum is there and whose parent's is not."""

    def __init__(self) -> None:
        self._there: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._there)

    def add(self, leaf: int) -> None:
        level, index = 0, leaf
        while (level, index ^ 1) in self._there:
            self._there.remove((level, index ^ 1))
            level, index = level + 1, index // 2
        self._there.add((level, index))


def _left(first: int, stop: int) -> int:
    """The fewest nodes that make up leaves ``first`` to ``stop - 1``."""
    count = 0
    while first < stop:
        size = 1 << ((stop - first).bit_length() - 1)
        first += min(size, first & -first) if first else size
        count += 1
    return count
