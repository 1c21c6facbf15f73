"""What CUDA graphs do to a training step, on the processor: nothing is done while it is captured, and each replay does
the same to the same memory, whatever Python has come to think meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptcore.optim.fused import FusedOptimizer


class HostRecorder:
    def __init__(self, optimizer: FusedOptimizer, refuses: str = "") -> None:
        self.optimizer, self.refuses = optimizer, refuses
        self.recorded = self.replayed = 0

    def running(self) -> Any:
        return contextlib.nullcontext()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.refuses:
            raise RuntimeError(self.refuses + "\nand more of it")
        self.recorded += 1
        before, numbers, drawn = self._python(), self._numbers(), torch.get_rng_state()
        work()
        made = [p.grad for p in self._parameters()]
        for tensor, value in numbers:
            tensor.data.copy_(value)
        torch.set_rng_state(drawn)

        def replay() -> None:
            self.replayed += 1
            after = self._python()
            self._put(before)
            work()
            for p, gradient in zip(self._parameters(), made, strict=True):
                if gradient is not None and p.grad is not None and gradient is not p.grad:
                    gradient.copy_(p.grad)  # to where it was when this was recorded
            self._put(after)

        return replay

    def numbers(self, values: Tensor) -> Callable[[], list[float]]:
        kept = values.clone()
        return kept.tolist

    def elapsed(self) -> Callable[[], float | None]:
        return lambda: 0.25

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _numbers(self) -> list[tuple[Tensor, Tensor]]:
        states = [
            t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
        ]
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        tensors = [*self._parameters(), *gradients, *states, *self.optimizer._sums.values()]
        return [(t, t.detach().clone()) for t in tensors]

    def _python(self) -> Any:
        """Where gradients and sums are: what a graph has as addresses."""
        return [p.grad for p in self._parameters()], set(self.optimizer._summed)

    def _put(self, state: Any) -> None:
        gradients, summed = state
        for p, gradient in zip(self._parameters(), gradients, strict=True):
            p.grad = gradient
        self.optimizer._summed = set(summed)
