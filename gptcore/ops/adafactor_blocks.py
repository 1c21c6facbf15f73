"""Adafactor over slices of parameters with several owners, in phases between which they exchange sums of blocks."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from gptcore import backend
from gptcore.ops.arrays import Array, empty
from gptcore.ops.grad_norm import Number, per_parameter

FLAT_BLOCK = 1024
"""Elements of a block of what is not factored, and a divisor of those of a block of rows."""

# Of a matrix. Owners tell each other two numbers a column and block: little beside 768 rows or more.
_BLOCKS = 16


def row_block(shape: Sequence[int]) -> int:
    """Rows of a block of a matrix, or of each matrix of a batch (..., n, m); of the shape alone.

    At most 16 blocks to a matrix, each of a multiple of 1,024 elements but for the last, which may be shorter. Blocks
    begin anew with each matrix.

    Raises:
        ValueError: a shape of fewer than two dimensions.
    """
    if len(shape) < 2:
        raise ValueError(f"row_block: argument 'shape': got {tuple(shape)}, expected two dimensions or more")
    rows, cols = shape[-2:]
    multiple = FLAT_BLOCK // math.gcd(cols, FLAT_BLOCK)
    return max(1, -(-rows // (_BLOCKS * multiple))) * multiple


def blocks_before(shape: Sequence[int], element: int, factored: bool) -> int:
    """How many blocks of a parameter of this shape begin before an element, flattened; of all where it is the end."""
    if not factored:
        return -(-element // FLAT_BLOCK)
    rows, cols = shape[-2:]
    if not math.prod(shape):
        return 0
    block, row = row_block(shape), element // cols
    return row // rows * -(-rows // block) + -(-(row % rows) // block)


def adafactor_blocks_(
    params: Sequence[Array],
    grads: Sequence[Array],
    row_vars: Sequence[Array | None],
    col_vars: Sequence[Array | None],
    variances: Sequence[Array | None],
    wholes: Sequence[tuple[Sequence[int], int]],
    *,
    grad_norm: Number,
    step_size: Number,
    beta2: Number,
    eps: tuple[float, float] = (1e-30, 1e-3),
    eps_added: bool = True,
    clip_threshold: float | None = 1.0,
    scale_parameter: bool = True,
    weight_decay: float | Sequence[float] = 0.0,
    scaled_decay: bool = False,
    exp_avgs: Sequence[Array] | None = None,
    beta1: float = 0.0,
    maximize: bool = False,
    copies: Sequence[Array] | None = None,
    max_norm: float | None = None,
    grad_scale: Number = 1.0,
    decay_factor: Number = 1.0,
) -> Generator[list[Array], list[Array], None]:
    """The step of :func:`gptcore.ops.adafactor_` on slices, with the bits of any other cut.

    A generator: it yields one f64 array (blocks, width) for each slice, of that slice's own blocks, and is sent the
    same of all blocks of each whole, in order; twice, and then the parameters are written. Where one owner has all
    slices whole, what it is sent is what it yielded::

        phases = adafactor_blocks_(...)
        all_sums = combine(next(phases))
        all_sums = combine(phases.send(all_sums))
        phases.send(all_sums)       # raises StopIteration: done

    Blocks of a factored parameter are :func:`row_block` rows, of another 1,024 elements. First come sums of squares by
    columns and the sum of the means over rows, 2 m + 3 numbers a block of a matrix of m columns, 2 of others; the
    second time, one number: the sum of squares of the update, or 0 where the first have told it.

    Args:
        params, grads, variances, exp_avgs, copies: as for :func:`gptcore.ops.adafactor_`, of slices in any shape.
        row_vars: one element for each row of the slice, in any shape; None where there is a variance.
        col_vars: one element for each column of each matrix of the whole, in any shape: every owner has a copy, and
            all move on alike. None where there is a variance.
        wholes: of each slice the shape of the parameter that it is cut from, and its first element there, flattened.
            Slices begin and end with blocks.
        grad_norm: the norm of all owners' gradients, which :func:`gptcore.ops.square_sums` gives and has found finite.
            An array of one element may hold one that is not: nothing is written then, and what is yielded is void.
        step_size, beta2, ...: as for :func:`gptcore.ops.adafactor_`; the same for all owners of a parameter. On a GPU
            nothing waits for numbers in arrays; what owners exchange stays there.

    Raises:
        ValueError, TypeError: what does not fit; nothing is written then.
    """
    extension = backend.extension()
    factored = [v is None for v in variances]
    slices = [_numbers(shape, start, f) for (shape, start), f in zip(wholes, factored, strict=True)]
    call = (
        params, grads, row_vars, col_vars, variances, () if exp_avgs is None else exp_avgs,
        () if copies is None else copies, slices, per_parameter(weight_decay, len(params)), step_size, beta2, beta1,
        *eps, eps_added, clip_threshold, scale_parameter, scaled_decay, maximize, max_norm, grad_scale, grad_norm,
        decay_factor,
    )  # fmt: skip
    own = [
        blocks_before(shape, start + math.prod(p.shape), f) - blocks_before(shape, start, f)
        for p, (shape, start), f in zip(params, wholes, factored, strict=True)
    ]
    widths = [2 * shape[-1] + 3 if f else 2 for (shape, _), f in zip(wholes, factored, strict=True)]
    statistics = [empty(p, (n, w), "float64") for p, n, w in zip(params, own, widths, strict=True)]
    extension.adafactor_blocks(1, *call, statistics, (), ())
    statistics = yield statistics
    matrices = [_matrices(shape) if f else 0 for (shape, _), f in zip(wholes, factored, strict=True)]
    totals = [empty(p, (m + 2,), "float64") for p, m in zip(params, matrices, strict=True)]
    sums = [empty(p, (n, 1), "float64") for p, n in zip(params, own, strict=True)]
    extension.adafactor_blocks(2, *call, statistics, totals, sums)
    sums = yield sums
    extension.adafactor_blocks(3, *call, (), totals, sums)


def _numbers(shape: Sequence[int], start: int, factored: bool) -> tuple[int, int, int, int, int]:
    """A whole and where its slice begins, as the kernel takes them."""
    rows, cols, block = (*shape[-2:], row_block(shape)) if factored else (0, 0, 0)
    return math.prod(shape), rows, cols, block, start


def _matrices(shape: Sequence[int]) -> int:
    """How many there are with elements."""
    elements = math.prod(shape)
    return elements // (shape[-2] * shape[-1]) if elements else 0
