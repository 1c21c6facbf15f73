"""How parameters are put into flat units, where those may be cut, and which parts of them an optimizer has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from gptcore.dist.flat_unit import BLOCK, FlatUnit, Piece
from gptcore.dist.gather_on_use import GatherOnUse, blocks_of
from gptcore.dist.group import Member
from gptcore.optim.adafactor import Adafactor
from gptcore.optim.fused import FusedOptimizer
from gptcore.optim.slices import Whole, row_block


class Place(NamedTuple):
    """Where a parameter is: number ``number`` of unit ``unit``."""

    unit: int
    number: int


class Owned(NamedTuple):
    """Elements ``start`` to ``stop - 1`` of ``parameter``, flattened, which this rank answers for.

    ``weights`` are those elements; ``part`` is the wrapped optimizer's parameter that they are in, whose first element
    is number ``part_start`` of ``parameter``.
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    weights: Tensor
    part: nn.Parameter
    part_start: int


class Layout:
    """``parameters`` in units, in stage 3 those of a block of ``module`` together; ``weights`` gathers them then.

    Args:
        parameters: all of the optimizer, in its order; those that are not trained are in no unit.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: FusedOptimizer,
        member: Member,
        stage: int,
        module: nn.Module | None,
        bucket: int,
    ) -> None:
        self.stage = stage
        self.numbers = {p: number for number, p in enumerate(parameters)}
        rest = dict.fromkeys(as_gradients_come([p for p in parameters if p.requires_grad], module))
        blocks: list[tuple[nn.Module, list[FlatUnit]]] = []
        if stage == 3 and module is not None:
            for block in reversed(blocks_of(module)):
                own = [p for p in block.parameters() if p in rest]
                for p in own:
                    del rest[p]
                blocks.append((block, units_of(own, optimizer, member, None)))
        root = units_of(rest, optimizer, member, bucket)
        self.units = [*(unit for _, units in blocks for unit in units), *root]
        self.places = {
            p: Place(i, number)
            for i, unit in enumerate(self.units)
            for number, p in enumerate(unit.parameters)
        }
        self.weights = GatherOnUse(blocks, root) if stage == 3 else None
        self.pieces: dict[nn.Parameter, tuple[Place, Piece]] = {}

    def hand_to(
        self, optimizer: FusedOptimizer, part_of: Callable[[Tensor], nn.Parameter] = nn.Parameter
    ) -> None:
        """The optimizer has parts of parameters in their place from now on: this rank's slices, in stage 0 all.

        ``part_of``: a parameter for some elements of weights, by default those themselves.
        """
        of_parameter: dict[nn.Parameter, list[nn.Parameter]] = {}
        for i, unit in enumerate(self.units):
            for piece in unit.all_pieces() if self.stage == 0 else unit.pieces():
                whole = unit.parameters[piece.number]
                weights = unit.flat if self.stage == 0 else unit.own
                at = piece.at - (0 if self.stage == 0 else unit.low)
                part = part_of(weights[at : at + piece.stop - piece.start])
                part.whole = Whole(  # type: ignore[attr-defined]
                    whole.numel(), tuple(whole.shape), piece.start, self.numbers[whole]
                )
                self.pieces[part] = Place(i, piece.number), piece
                of_parameter.setdefault(whole, []).append(part)
        for group in optimizer.param_groups:
            group["params"] = [part for p in group["params"] for part in of_parameter.get(p, [])]

    def wholes(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """The optimizer's parts, each with the parameter that it is of."""
        for part, (place, _) in self.pieces.items():
            yield part, self.units[place.unit].parameters[place.number]

    def owned(self, names: dict[nn.Parameter, str], whole_parts: bool) -> Iterator[Owned]:
        """See :meth:`ZeroOptimizer.owned`."""
        for part, (place, piece) in self.pieces.items():
            unit = self.units[place.unit]
            p = unit.parameters[place.number]
            start, stop = piece.start, piece.stop
            if self.stage == 0 and not whole_parts:
                low, high = unit.low - unit.offsets[place.number], unit.high - unit.offsets[place.number]
                start, stop = max(start, low), min(stop, high)
            if start < stop:
                elements = part.detach()[start - piece.start : stop - piece.start]
                yield Owned(names[p], p, start, stop, elements, part, piece.start)


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
