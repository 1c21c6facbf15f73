"""ZeRO: optimizer states, gradients and weights divided over the ranks of a group, around any of our optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from gptcore.dist.flat_unit import FlatUnit, Piece
from gptcore.dist.gather_on_use import GatherOnUse, blocks_of
from gptcore.dist.group import Member, agree, member_of
from gptcore.dist.shard import sharded_parameters
from gptcore.dist.unit_gradients import Leaves, Message, UnitGradients
from gptcore.optim.adafactor import Adafactor
from gptcore.optim.fused import FusedOptimizer
from gptcore.optim.slices import Whole
from gptcore.optim.zero_layout import as_gradients_come, units_of
from gptcore.optim.zero_sums import norm_of_all, step_in_phases


class _Place(NamedTuple):
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


class ZeroOptimizer(torch.optim.Optimizer):
    """``optimizer`` with its states, and by ``stage`` more, divided over the ranks of ``group``.

    ::

        optimizer = ZeroOptimizer(AdamW(decay_groups(model, 0.1), lr=3e-4, max_norm=1.0), stage=2, module=model)
        for batch in loader:                      # of this rank
            model(*batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    With P parameters, N ranks, bytes for f32 weights under AdamW (Rajbhandari et al. 2020, section 5):

    === ============================================== ==================================================
    0   nothing is divided: data parallel training     16 P
    1   states                                         8 P + 8 P / N
    2   states and gradients                           4 P + 12 P / N
    3   states, gradients and weights                  16 P / N, and the weights of two blocks and the root
    === ============================================== ==================================================

    Each backward pass is a leaf. Leaves are summed in f32 in a fixed binary tree over their numbers (:meth:`leaves`
    says which a rank has), and everything that looks at many gradients at once, as the norm, goes by fixed blocks: so
    the weights after a step have the same bits for any number of ranks that divides the leaves, and for any stage. A
    backward pass must itself give the same bits on every rank, as our models do. A parameter that a leaf did not use
    counts as zero there, and one that no leaf of any rank used is left alone.

    ``step`` divides gradients by the number of ranks, as ``DistributedDataParallel`` does, and by ``grad_scale``; so
    for a mean over ``accumulation`` leaves give that. Clipping is the optimizer's ``max_norm``: parameters have no
    ``grad``, and ``torch.nn.utils.clip_grad_norm_`` would find nothing.

    Args:
        optimizer: one of ours that has not stepped yet; it goes on to work on this rank's slices.
        stage: 0 to 3.
        module: the model, the same on all ranks; its parameters' names name states, and stage 3 needs it: its blocks
            (elements of its outermost ``ModuleList``s) are gathered when they run, the rest when it does.
        group: a process group; None: all processes, or this process alone where torch.distributed is not initialised.
        accumulation: backward passes of a step on each rank. Stages 0 and 1 add them up where they are made and send
            sums once; stages 2 and 3 send each, since no rank keeps a whole gradient.
        fixed_tree: False adds leaves as they come: one sum instead of several. In stages 2 and 3 that is the order of
            their numbers, whatever the ranks; in stages 0 and 1 a rank's leaves, then the ranks' sums, so that the bits
            depend on the number of ranks.
        bucket: elements of gradient that are sent together, about.

    Raises:
        TypeError: an optimizer that is none of ours.
        ValueError: one that has stepped; a stage, a module or a number that does not fit; ranks that differ.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        *,
        stage: int = 1,
        module: nn.Module | None = None,
        group: Any = None,
        accumulation: int = 1,
        fixed_tree: bool = True,
        bucket: int = 8 << 20,
    ) -> None:
        _check(optimizer, stage, module, accumulation, bucket)
        single = group is None and not (c10d.is_available() and c10d.is_initialized())
        self.member = Member(None, 0, 1) if single else member_of("ZeroOptimizer", group)
        self.stage, self.module, self.optimizer = stage, module, optimizer
        self.accumulation, self.fixed_tree = accumulation, fixed_tree
        super().__init__([dict(group) for group in optimizer.param_groups], optimizer.defaults)
        self.last_grad_norm: float | None = 0.0
        self.found_inf = False
        self._agree()
        self._build_units(bucket)
        self._leaves = self._leaves_of_step()
        self._gradients: list[UnitGradients] = []
        self._pieces: dict[nn.Parameter, tuple[_Place, Piece]] = {}
        self._hand_pieces_to_optimizer()
        self._begin_step()
        for p in self._places:
            p.register_post_accumulate_grad_hook(self._arrived)

    # --- layout ----------------------------------------------------------------------------------------------

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _agree(self) -> None:
        """All ranks have the same to divide."""
        if self.member.ranks == 1:
            return
        parameters = self._parameters()
        same = {
            "stage": self.stage, "accumulation": self.accumulation, "fixed_tree": self.fixed_tree,
            "parameters": len(parameters), "elements": sum(p.numel() for p in parameters),
            "trainable": sum(p.requires_grad for p in parameters),
        }  # fmt: skip
        agree("ZeroOptimizer", self.member, same)

    def _build_units(self, bucket: int) -> None:
        trained = [p for p in self._parameters() if p.requires_grad]
        blocks: list[tuple[nn.Module, list[FlatUnit]]] = []
        rest = dict.fromkeys(as_gradients_come(trained, self.module))
        self.units: list[FlatUnit] = []
        if self.stage == 3 and self.module is not None:
            for block in reversed(blocks_of(self.module)):
                own = [p for p in block.parameters() if p in rest]
                for p in own:
                    del rest[p]
                blocks.append((block, units_of(own, self.optimizer, self.member, None)))
        root = units_of(rest, self.optimizer, self.member, bucket)
        self.units = [*(unit for _, units in blocks for unit in units), *root]
        self._places = {
            p: _Place(i, number)
            for i, unit in enumerate(self.units)
            for number, p in enumerate(unit.parameters)
        }
        self._weights = GatherOnUse(blocks, root) if self.stage == 3 else None
        if self._weights is not None and self.module is not None:
            self.module.register_forward_pre_hook(lambda module, inputs: self._weights.forward_begins())

    def _hand_pieces_to_optimizer(self) -> None:
        """The wrapped optimizer has slices for parameters from now on."""
        of_parameter: dict[nn.Parameter, list[nn.Parameter]] = {}
        numbers = {p: number for number, p in enumerate(self._parameters())}
        for i, unit in enumerate(self.units):
            for piece in unit.pieces(-1 if self.stage == 0 else None):
                whole = unit.parameters[piece.number]
                weights = unit.flat if self.stage == 0 else unit.own
                at = piece.at - (0 if self.stage == 0 else unit.low)
                part = nn.Parameter(weights[at : at + piece.stop - piece.start])
                part.whole = Whole(  # type: ignore[attr-defined]
                    whole.numel(), tuple(whole.shape), piece.start, numbers[whole]
                )
                self._pieces[part] = _Place(i, piece.number), piece
                of_parameter.setdefault(whole, []).append(part)
        for group in self.optimizer.param_groups:
            group["params"] = [part for p in group["params"] for part in of_parameter.get(p, [])]

    def owned(self, *, whole_parts: bool = False) -> Iterator[Owned]:
        """What this rank answers for: of every element of every trained parameter one rank does.

        ``whole_parts``: instead what its optimizer works on, which in stage 0 is everything.
        """
        names = {} if self.module is None else {p: name for name, p in self.module.named_parameters()}
        numbers = {p: f"parameter{i}" for i, p in enumerate(self._parameters())}
        for part, (place, piece) in self._pieces.items():
            unit = self.units[place.unit]
            p = unit.parameters[place.number]
            start, stop = piece.start, piece.stop
            if self.stage == 0 and not whole_parts:
                low, high = unit.low - unit.offsets[place.number], unit.high - unit.offsets[place.number]
                start, stop = max(start, low), min(stop, high)
            if start < stop:
                elements = part.detach()[start - piece.start : stop - piece.start]
                name = names.get(p, numbers[p])
                yield Owned(name, p, start, stop, elements, part, piece.start)

    def exchange(self, optimizer: FusedOptimizer) -> None:
        """Go on with another optimizer over the slices that the present one has, in the same groups."""
        self.optimizer = optimizer
        for outer, inner in zip(self.param_groups, optimizer.param_groups, strict=True):
            parameters = outer["params"]
            outer.clear()
            outer.update({**inner, "params": parameters})

    def trained(self) -> set[nn.Parameter]:
        """The parameters that are divided and updated."""
        return set(self._places)

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Give all ranks what each has written to the weights that it owns; every rank calls it."""
        if self._weights is not None:
            self._weights.free()
        elif self.stage > 0:
            for unit in self.units:
                unit.start_gather()
            for unit in self.units:
                unit.wait()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights, on every rank, for reading; every rank enters it."""
        if self._weights is None:
            yield
            return
        self._weights.gather()
        try:
            yield
        finally:
            self._weights.free()

    # --- backward --------------------------------------------------------------------------------------------

    def leaves(self, rank: int | None = None) -> range:
        """The numbers, from 0, of the leaves of an update that are ``rank``'s (this one's), in the order in which it
        runs them: neighbours in stages 0 and 1, every N-th of N ranks' in stages 2 and 3."""
        return self._leaves_of_step().of_rank(self.member.rank if rank is None else rank)

    def _leaves_of_step(self) -> Leaves:
        return Leaves(self.member.ranks, self.accumulation, self.fixed_tree, self.stage >= 2)

    def _begin_step(self) -> None:
        self._leaf = 0  # backward passes that are through
        self._open = False  # whether one is under way
        self._next = 0  # the unit that is to end it next
        self._used: set[nn.Parameter] = set()
        leaves = self._leaves_of_step()
        if not self._gradients or leaves != self._leaves:
            self._leaves = leaves
            messages: list[Message] = []
            self._gradients = [UnitGradients(unit, leaves, messages) for unit in self.units]

    def _arrived(self, p: nn.Parameter) -> None:
        """Called by autograd with a parameter's gradient of this leaf in place."""
        if not self._open:
            self._begin_leaf()
        self._used.add(p)
        if self._leaves.total == 1:
            return  # nothing is added to it: it is used where it lies
        unit, number = self._places[p]
        assert p.grad is not None
        self._gradients[unit].put(number, p.grad)
        p.grad = None
        # In the order of units on every rank, whatever the order in which they are complete.
        while self._next < len(self.units) and self._gradients[self._next].complete:
            self._end_unit()

    def _begin_leaf(self) -> None:
        if self._leaf == self.accumulation:
            raise RuntimeError(
                f"ZeroOptimizer: got backward pass {self._leaf + 1} of a step, expected {self.accumulation}; "
                "call step, or set accumulation"
            )
        if self._leaf == 0 and self._leaves.each != self.accumulation:
            self._begin_step()
        self._open = True
        torch.autograd.Variable._execution_engine.queue_callback(self._end_leaf)

    def _end_unit(self) -> None:
        self._gradients[self._next].end_leaf(self._leaf)
        if self._weights is not None:
            self._weights.has_gradients(self.units[self._next])
        self._next += 1

    def _end_leaf(self) -> None:
        """Called by autograd when a backward pass is through."""
        while self._next < len(self.units) and self._leaves.total > 1:
            self._end_unit()
        if self._weights is not None:
            self._weights.backward_ends()
        self._open, self._next = False, 0
        self._leaf += 1

    # --- the step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: float = 1.0,
        admit: Callable[[float], bool] | None = None,
    ) -> float | None:
        """One update, made by all ranks together. Gradients are divided by the number of ranks and ``grad_scale``.

        Args:
            closure: computes the loss anew, with gradients; its value is returned.
            admit: asked with the norm of finite gradients, which is the same on all ranks, before anything is written;
                where it answers False, nothing is.

        Raises:
            RuntimeError: fewer backward passes than ``accumulation`` since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._leaf != self.accumulation:
            raise RuntimeError(
                f"ZeroOptimizer.step: got {self._leaf} backward passes since the last step, "
                f"expected {self.accumulation}"
            )
        scale = grad_scale * self.member.ranks
        gradients = self._summed_gradients()
        # In stage 0 every rank has all gradients.
        owners = self.member if self.stage else Member(None, 0, 1)
        norm, self.found_inf = norm_of_all(list(gradients.values()), scale, owners)
        self.last_grad_norm = norm
        if not self.found_inf and (admit is None or admit(norm)):
            self._update(gradients, norm, scale)
        self._begin_step()
        return loss

    def _summed_gradients(self) -> dict[Tensor, Tensor]:
        """Of this rank's pieces (in stage 0 of all) whose parameter some leaf of some rank used."""
        used = self._used_anywhere()
        if self._leaves.total == 1:
            return {part: p.grad.reshape(-1) for part, p in self._wholes() if p.grad is not None}
        sums = []
        for unit, gradients in zip(self.units, self._gradients, strict=True):
            own = gradients.total()
            sums.append((self._whole(unit, own), 0) if self.stage == 0 else (own, unit.low))
        found: dict[Tensor, Tensor] = {}
        for part, p in self._wholes():
            if p in used:
                place, piece = self._pieces[part]
                values, low = sums[place.unit]
                found[part] = values[piece.at - low : piece.at - low + part.numel()]
        return found

    def _wholes(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """The pieces that the wrapped optimizer has, each with the parameter that it is of."""
        for part, (place, _) in self._pieces.items():
            yield part, self.units[place.unit].parameters[place.number]

    def _whole(self, unit: FlatUnit, own: Tensor) -> Tensor:
        """All ranks' slices of a gradient."""
        if self.member.ranks == 1:
            return own
        whole = own.new_empty(unit.numel)
        whole[unit.low : unit.low + len(own)] = own
        unit.exchange_slices(whole)
        return whole

    def _used_anywhere(self) -> set[nn.Parameter]:
        if self.member.ranks == 1 or not self._places:
            return self._used
        flags = torch.tensor([p in self._used for p in self._places], dtype=torch.int32)
        c10d.all_reduce(flags, op=c10d.ReduceOp.MAX, group=self.member.group)
        return {p for p, flag in zip(self._places, flags.tolist(), strict=True) if flag}

    def _update(self, gradients: dict[Tensor, Tensor], norm: float, scale: float) -> None:
        for outer, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            inner.update({key: value for key, value in outer.items() if key != "params"})
        self.optimizer.take_gradients(gradients)
        if isinstance(self.optimizer, Adafactor) and self.member.ranks > 1 and self.stage > 0:
            step_in_phases(self.optimizer, norm, scale, self.member)
        else:
            self.optimizer.step(grad_scale=scale, grad_norm=(norm, False))
        self.optimizer.zero_grad()
        self.weights_changed()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those of leaves since the last step among them; all ranks call it."""
        super().zero_grad(set_to_none)
        if self._leaf:
            for gradients in self._gradients if self._leaves.total > 1 else []:
                gradients.forget()
            self._begin_step()


def _check(optimizer: Any, stage: int, module: Any, accumulation: int, bucket: int) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"ZeroOptimizer: argument 'optimizer': got {type(optimizer).__name__}, expected one of gptcore.optim"
        )
    if optimizer.state:
        raise ValueError("ZeroOptimizer: argument 'optimizer': got one that has stepped, expected a new one")
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeroOptimizer: argument 'stage': got {stage}, expected 0, 1, 2 or 3")
    if module is not None and sharded_parameters(module):
        name = next(iter(sharded_parameters(module)))
        raise ValueError(
            f"ZeroOptimizer: argument 'module': got a slice of '{name}', expected all of every parameter on every "
            "rank; experts spread over ranks are not divided further"
        )
    if stage == 3 and module is None:
        raise ValueError(
            "ZeroOptimizer: argument 'module': got None, expected the model, whose weights stage 3 divides"
        )
    for name, value in (("accumulation", accumulation), ("bucket", bucket)):
        if value < 1:
            raise ValueError(f"ZeroOptimizer: argument '{name}': got {value}, expected 1 or more")
