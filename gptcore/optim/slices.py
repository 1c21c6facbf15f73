"""What an optimizer must know of a parameter that is a slice of a larger one.

An owner of the slice [start, stop) of a parameter, flattened, gives its optimizer a parameter of those elements with
an attribute ``whole``. Whatever looks at more than one element then goes by the whole, so that the bits do not depend
on the cut. A parameter without the attribute is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptcore.ops.adafactor_blocks import row_block

__all__ = ["BlockSums", "StatePlace", "Whole", "join_blocks", "row_block", "whole_of"]


@dataclass(frozen=True)
class Whole:
    """The parameter that a slice is cut from: ``slice.whole = Whole(...)``.

    Args:
        numel: its elements.
        shape: its shape.
        start: the slice's first element in it, flattened.
        number: its position in the optimizer's list, over all groups, from 0.
    """

    numel: int
    shape: tuple[int, ...]
    start: int
    number: int


def whole_of(p: torch.Tensor, number: int) -> Whole:
    """``p.whole``, or where it has none that of ``p`` itself, at this position of the optimizer's list."""
    whole: Whole | None = getattr(p, "whole", None)
    return Whole(p.numel(), tuple(p.shape), 0, number) if whole is None else whole


@dataclass(frozen=True)
class StatePlace:
    """Where a state of some elements of a parameter belongs.

    Args:
        start, stop: in the state of the whole parameter, flattened.
        shape: of the state of the whole parameter.
        kept: in which the owner of those elements has its part.
        shared: every owner of the parameter has all of it, the same.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    kept: tuple[int, ...] = (-1,)
    shared: bool = False


@dataclass(frozen=True)
class BlockSums:
    """What an owner tells the others of its slice: sums over its blocks, in order.

    Args:
        whole: what the slice is cut from.
        first: the number of the slice's first block, among the whole's.
        count: how many the whole has.
        values: f64 of (the slice's blocks, width).
    """

    whole: Whole
    first: int
    count: int
    values: torch.Tensor


def join_blocks(blocks: Sequence[BlockSums]) -> list[torch.Tensor]:
    """For each entry the sums of all blocks of its whole, (count, width): those of entries that share it, in order.

    Raises:
        ValueError: blocks of a whole that nobody has, or more than one.
    """
    of_whole: dict[int, list[BlockSums]] = {}
    for entry in blocks:
        of_whole.setdefault(entry.whole.number, []).append(entry)
    joined = {number: _joined(entries) for number, entries in of_whole.items()}
    return [joined[entry.whole.number] for entry in blocks]


def _joined(entries: list[BlockSums]) -> torch.Tensor:
    ordered = sorted(entries, key=lambda entry: (entry.first, len(entry.values)))
    end = 0
    for entry in ordered:
        if entry.first == end or not len(entry.values):
            end += len(entry.values)
    if end != ordered[0].count or sum(len(entry.values) for entry in ordered) != end:
        raise ValueError(
            f"join_blocks: argument 'blocks': got {end} in a row of the {ordered[0].count} blocks of parameter "
            f"{ordered[0].whole.number}, expected each once"
        )
    return ordered[0].values if len(ordered) == 1 else torch.cat([entry.values for entry in ordered])
