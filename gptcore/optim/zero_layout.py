"""How parameters are put into flat units, and where those may be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from gptcore.dist.flat_unit import BLOCK, FlatUnit
from gptcore.dist.group import Member
from gptcore.optim.adafactor import Adafactor
from gptcore.optim.fused import FusedOptimizer
from gptcore.optim.slices import row_block


def as_gradients_come(parameters: Sequence[nn.Parameter], module: nn.Module | None) -> list[nn.Parameter]:
    """About in the order in which backward makes their gradients: the reverse of the module's, or of the given one.

    Groups of an optimizer mix what lies far apart: a unit of the first and the last layer would be complete, and sent,
    only when backward is over.
    """
    if module is None:
        return list(reversed(parameters))
    place = {p: i for i, p in enumerate(module.parameters())}
    return sorted(parameters, key=lambda p: place.get(p, len(place)), reverse=True)


def units_of(
    parameters: Iterable[nn.Parameter], optimizer: FusedOptimizer, member: Member, bucket: int | None
) -> list[FlatUnit]:
    """Units of one dtype and device each, in the parameters' order, of about ``bucket`` elements (None: any)."""
    units: list[FlatUnit] = []
    waiting: dict[Any, list[nn.Parameter]] = {}
    filled: dict[Any, int] = {}
    step = _cut_step(optimizer)
    for p in parameters:
        kind = (p.dtype, p.device)
        if bucket is not None and filled.get(kind, 0) and filled[kind] + p.numel() > bucket:
            units.append(FlatUnit(waiting.pop(kind), member, step))
            filled[kind] = 0
        waiting.setdefault(kind, []).append(p)
        filled[kind] = filled.get(kind, 0) + p.numel()
    return [*units, *(FlatUnit(left, member, step) for left in waiting.values())]


def _cut_step(optimizer: FusedOptimizer) -> Callable[[nn.Parameter], int]:
    """Elements between the places where a parameter may be cut: of a matrix with row statistics, blocks of rows."""
    if not isinstance(optimizer, Adafactor) or optimizer.variant == "palm":
        return lambda p: BLOCK

    def step(p: nn.Parameter) -> int:
        if p.dim() < 2:
            return BLOCK
        rows, columns = p.shape[-2:]
        block = row_block(p.shape)
        if p.dim() > 2 and rows % block:  # a matrix's last block is shorter, and the next matrix begins anew
            return rows * columns if rows * columns % BLOCK == 0 else p.numel()
        return block * columns

    return step
