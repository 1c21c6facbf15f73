"""The phases of several calls of Adafactor run side by side, and by one owner alone."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from itertools import islice

import torch

from gptcore.ops.adafactor_blocks import blocks_before
from gptcore.optim.fused import Call
from gptcore.optim.slices import BlockSums, join_blocks

Phases = Generator[list[torch.Tensor], list[torch.Tensor], None]
"""What ``adafactor_blocks_`` returns: yields sums of own blocks and is sent those of all, twice."""


def in_step(calls: list[Call], running: list[Phases]) -> Generator[list[BlockSums], list[torch.Tensor], None]:
    """Phases of several calls as those of one: their sums in one list, so that owners exchange them at once."""
    sums = [next(phases) for phases in running]
    for last in (False, True):
        joined = iter((yield [b for call, own in zip(calls, sums, strict=True) for b in _blocks(call, own)]))
        for i, (call, phases) in enumerate(zip(calls, running, strict=True)):
            own = list(islice(joined, len(call.params)))
            if last:
                with suppress(StopIteration):
                    phases.send(own)
            else:
                sums[i] = phases.send(own)


def drive(phases: Generator[list[BlockSums], list[torch.Tensor], None]) -> None:
    """Run phases whose slices are all here."""
    with suppress(StopIteration):
        blocks = next(phases)
        while True:
            blocks = phases.send(join_blocks(blocks))


def check_complete(call: Call) -> None:
    """Refuse slices whose wholes are not here, before anything is written."""
    here: dict[int, int] = {}
    for p, whole in zip(call.params, call.wholes, strict=True):
        here[whole.number] = here.get(whole.number, 0) + p.numel()
    for whole in call.wholes:
        if here[whole.number] != whole.numel:
            raise ValueError(
                f"Adafactor: argument 'params': got {here[whole.number]} of the {whole.numel} elements of parameter "
                f"{whole.number}, expected all; step_phases() is the step of slices with several owners"
            )


def _blocks(call: Call, sums: list[torch.Tensor]) -> list[BlockSums]:
    entries = []
    for whole, state, values in zip(call.wholes, call.states, sums, strict=True):
        factored = "row_var" in state
        first, count = (blocks_before(whole.shape, at, factored) for at in (whole.start, whole.numel))
        entries.append(BlockSums(whole, first, count, values))
    return entries
