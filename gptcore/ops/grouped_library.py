"""Large f32 groups of ``grouped_linear``, whose products MKL makes faster: which they are, and those products.

MKL is asked for bits that do not change with the threads (``MKL_CBWR``), and then a row's do not change with the other
rows from about 17 on. Where it was not asked, no group is the library's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from gptcore import backend
from gptcore.ops.arrays import Array, is_torch


class Largest(NamedTuple):
    """Rows up to which a group's product is ours."""

    y: int
    dx: int
    dweight: int


ALL_OURS = Largest(*(2**63 - 1,) * 3)
# With 1024 rows MKL is 1.02 to 1.14 times as fast. With 64 to 256 ours is, 1.2 times for y and 1.6 for dweight, but not
# for dx, where it packs across the weight's lines (docs/kernels/grouped_linear.md).
_LARGEST = Largest(y=511, dx=63, dweight=511)
# Narrower products are fixed-order kernels' everywhere in the package.
_NARROWEST = 64


def largest_of_ours(x: Array, weight: Array, *others: Array | None) -> Largest:
    """The limits for a call with these arrays, which need not be checked yet; ``others`` take part too."""
    if not all(is_torch(a) for a in (x, weight, *others) if a is not None):
        return ALL_OURS
    import torch

    ours = (
        x.dtype != torch.float32
        or x.device.type != "cpu"
        or min(weight.shape[1:], default=0) < _NARROWEST
        or not backend.mkl_is_strict()
        or torch.backends.mkldnn.matmul.fp32_precision not in ("none", "ieee")  # type: ignore[attr-defined]
    )
    return ALL_OURS if ours else _LARGEST


def _groups(offsets: Array, largest: int) -> Iterator[tuple[int, slice]]:
    """Experts with more rows than that, and their rows."""
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if end - begin > largest:
            yield e, slice(begin, end)


def multiply_large(x: Any, weight: Any, offsets: Array, bias: Any, out: Any, largest: int) -> None:
    """Write the rows of ``out`` that the extension left out; its arguments, which it has checked."""
    import torch

    # Without detaching torch refuses out= where an argument requires a gradient, though none is asked for here.
    x, weight, out = x.detach(), weight.detach(), out.detach()
    for e, rows in _groups(offsets, largest):
        if bias is None:
            torch.mm(x[rows], weight[e].t(), out=out[rows])
        else:
            torch.addmm(bias[e], x[rows], weight[e].t(), out=out[rows])


def differentiate_large(
    dy: Any, x: Any, weight: Any, offsets: Array, dx: Any, dweight: Any, accumulate: bool, largest: Largest
) -> None:
    """Write the rows of ``dx`` and the experts of ``dweight`` that the extension left out."""
    import torch

    dy, x, weight, dx, dweight = (None if t is None else t.detach() for t in (dy, x, weight, dx, dweight))
    if dx is not None:
        for e, rows in _groups(offsets, largest.dx):
            torch.mm(dy[rows], weight[e], out=dx[rows])
    if dweight is not None:
        for e, rows in _groups(offsets, largest.dweight):
            if accumulate:
                dweight[e].addmm_(dy[rows].t(), x[rows])
            else:
                torch.mm(dy[rows].t(), x[rows], out=dweight[e])
