"""Weights of modules gathered just before they are used, and freed after: the third stage of ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.dist.flat_unit import FlatUnit


class GatherOnUse:
    """Keeps the units of each of ``modules`` freed but while the module runs, forward or backward.

    The order in which modules ran is remembered: while one computes, the next one's weights are on their way. What is
    no part of these modules (``root``) is gathered by the first forward pass after an update and stays until the next.

    Args:
        modules: none inside another; each with its units.
        root: units of everything else.
    """

    def __init__(self, modules: Sequence[tuple[nn.Module, list[FlatUnit]]], root: Sequence[FlatUnit]) -> None:
        self.root = list(root)
        self._units = [units for _, units in modules]
        self._order: list[int] = []
        self._backward = False
        self._handles: list[Any] = []
        for index, (module, _) in enumerate(modules):
            self._handles += [
                module.register_forward_pre_hook(self._before_forward(index)),
                module.register_forward_hook(self._after_forward(index), always_call=True),
            ]
        self.free()

    def free(self) -> None:
        """Give back all weights but this rank's slices."""
        for unit in self._all():
            unit.free()
        self._backward = False

    def gather(self) -> None:
        """All weights, for whoever reads them outside of the modules' own calls."""
        for unit in self._all():
            unit.gather()

    def forward_begins(self) -> None:
        """The root's weights, if they are not there."""
        for unit in self.root:
            unit.gather()

    def has_gradients(self, unit: FlatUnit) -> None:
        """All of the unit's gradients are made: this backward pass needs a module's weights no more."""
        if unit not in self.root:
            unit.free()

    def backward_ends(self) -> None:
        """What is still gathered of the modules goes."""
        self._backward = False
        for units in self._units:
            for unit in units:
                unit.free()

    def _all(self) -> list[FlatUnit]:
        return [*self.root, *(unit for units in self._units for unit in units)]

    def _gather(self, index: int, step: int) -> None:
        """Weights of module ``index``; those of its neighbour in the order of use, ``step`` further, set off."""
        for unit in self._units[index]:
            unit.gather()
        place = self._order.index(index) + step if index in self._order else -1
        if 0 <= place < len(self._order):
            for unit in self._units[self._order[place]]:
                if unit.freed:
                    unit.start_gather()

    def _before_forward(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if index not in self._order:
                self._order.append(index)
            self._gather(index, -1 if self._backward else 1)

        return hook

    def _after_forward(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._before_backward(index))
            if not self._backward:  # else this is a recomputation, whose backward follows
                for unit in self._units[index]:
                    unit.free()

        return hook

    def _before_backward(self, index: int) -> None:
        self._backward = True
        self._gather(index, -1)


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in what a module returned."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The elements of the outermost ``nn.ModuleList``s in ``module``: what repeats, as a model's layers do."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            found.extend(child)
        else:
            found.extend(blocks_of(child))
    return found
