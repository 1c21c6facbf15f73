"""What an optimizer must know of a parameter that is a slice of a larger one.

An owner of the slice [start, stop) of a parameter, flattened, gives its optimizer a parameter of those elements with
an attribute ``whole``. Whatever looks at more than one element then goes by the whole, so that the bits do not depend
on the cut. A parameter without the attribute is whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Each block of rows is whole blocks of 8-bit moments.
_ELEMENTS = 256
_BLOCKS = 64


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


def row_block(shape: Sequence[int]) -> int:
    """Rows of a block of a matrix, or of each matrix of a batch (..., n, m); of the shape alone.

    At most 64 blocks to a matrix, each of a multiple of 256 elements but for the last, which may be shorter. Blocks
    begin anew with each matrix. Slices that begin and end with blocks let :class:`gptcore.optim.Adafactor` give the
    bits of the whole.

    Raises:
        ValueError: a shape of fewer than two dimensions.
    """
    if len(shape) < 2:
        raise ValueError(f"row_block: argument 'shape': got {tuple(shape)}, expected two dimensions or more")
    rows, cols = shape[-2:]
    multiple = _ELEMENTS // math.gcd(cols, _ELEMENTS)
    return max(1, -(-rows // (_BLOCKS * multiple))) * multiple
