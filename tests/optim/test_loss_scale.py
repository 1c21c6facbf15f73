"""The loss scaler walks as torch's does, and the optimizers train f16 parameters by f32 masters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptcore.optim import SGD, Adafactor, Adam, AdamW, AdamW8bit, LossScaler
from gptcore.optim.fused import FusedOptimizer

# Whether each of 40 updates overflows: alone, in runs, and after stretches that let the scale grow.
PATTERN = [i in (3, 4, 11, 25, 26, 27) for i in range(40)]


def test_the_scale_walks_as_torchs() -> None:
    """Scale and growth tracker after every update, and state that either loads from the other on the way."""
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    ours = LossScaler(1024.0, growth_interval=4, minimum=1e-6)
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    oracle, optimizer = torch.optim.SGD([p], lr=0.5), SGD([q], lr=0.5)
    for i, overflows in enumerate(PATTERN):
        theirs.scale((p * 0.125).sum()).backward()
        ours.scale((q * 0.125).sum()).backward()
        if overflows:
            p.grad[1] = q.grad[1] = math.inf  # type: ignore[index]
        theirs.step(oracle)
        theirs.update()
        assert ours.step(optimizer) is not overflows
        oracle.zero_grad()
        optimizer.zero_grad()
        assert torch.equal(p, q), i
        mine, its = ours.state_dict(), theirs.state_dict()
        assert {name: mine[name] for name in its} == its, i
        if i == 20:
            fresh = LossScaler(7.0, growth_interval=9, minimum=1e-6)
            fresh.load_state_dict(its)
            theirs.load_state_dict({name: mine[name] for name in its})
            assert {**fresh.state_dict(), "skipped": 3} == mine
            ours.load_state_dict(mine)
    assert ours.skipped == sum(PATTERN) == 6


def test_collapse_is_told() -> None:
    scaler = LossScaler(8.0, minimum=2.0, patience=4)
    scales = []
    for _ in range(2):
        scaler.update(True)
        scales.append(scaler.get_scale())
        assert scaler.collapsed() is None
    scaler.update(True)
    assert [*scales, scaler.get_scale()] == [4.0, 2.0, 2.0]
    assert scaler.collapsed() == "gradients overflow at the least loss scale, 2"
    scaler.update(False)
    assert scaler.collapsed() is None and scaler.overflows == 0 and scaler.skipped == 3
    patient = LossScaler(patience=3)
    for expected in (None, None, "gradients overflowed in 3 updates one after the other"):
        patient.update(True)
        assert patient.collapsed() == expected


def test_mistakes() -> None:
    for name, value in (
        ("init_scale", 0.5), ("growth_factor", 1.0), ("backoff_factor", 1.0), ("growth_interval", 0),
        ("minimum", 0.0), ("patience", 0), ("init_scale", math.nan),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"LossScaler: argument '{name}': got {value}, expected"):
            LossScaler(**{name: value})
    with pytest.raises(ValueError, match="LossScaler: argument 'state': got .*, expected one with 'scale'"):
        LossScaler().load_state_dict(torch.amp.GradScaler("cpu", enabled=False).state_dict())


OPTIMIZERS: dict[str, Callable[[list[Any]], FusedOptimizer]] = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, max_norm=1.0),
    "adam split": lambda p: Adam(p, lr=0.01, split_master=True),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: Adafactor(p, lr=0.01),
    "adamw_8bit": lambda p: AdamW8bit(p, lr=0.01),
    "adamw_8bit without masters": lambda p: AdamW8bit(p, lr=0.01, master_weights=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_f16_parameters_are_their_f32_masters_rounded(name: str) -> None:
    """Masters have the bits of f32 parameters with the same gradients; an overflow writes nothing."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator).half() for shape in ((64, 80), (80,))]
    halves = [torch.nn.Parameter(p.clone()) for p in start]
    singles = [torch.nn.Parameter(p.float()) for p in start]
    ours, oracle = OPTIMIZERS[name](halves), OPTIMIZERS[name](singles)
    for step in range(6):
        sums = [torch.zeros(p.shape) for p in start]
        for _ in range(2):  # micro-batches
            for p, total in zip(halves, sums, strict=True):
                p.grad = (1024 * torch.randn(p.shape, generator=generator)).half()
                total += p.grad.float()
            ours.accumulate()
        assert all(p.grad is None for p in halves)
        for p, total in zip(singles, sums, strict=True):
            p.grad = total
        for optimizer in (ours, oracle):
            optimizer.step(grad_scale=2048.0)
            optimizer.zero_grad()
        for p, q in zip(halves, singles, strict=True):
            assert torch.equal(ours.state[p]["master"], q.detach()), step
            assert torch.equal(p, q.half()), step
    assert ours.last_grad_norm == oracle.last_grad_norm
    before = [p.detach().clone() for p in halves]
    for p in halves:
        p.grad = torch.full_like(p, math.inf)
    ours.step(grad_scale=2048.0)
    assert ours.found_inf and all(torch.equal(p, q) for p, q in zip(halves, before, strict=True))
