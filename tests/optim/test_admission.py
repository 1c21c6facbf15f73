"""``step(admit=...)``: asked with the norm before anything is written, and without effect on an admitted update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptcore.optim import SGD, Adafactor, Adam, AdamW, AdamW8bit
from gptcore.optim.fused import FusedOptimizer

MAKERS: dict[str, Callable[..., FusedOptimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "adamw_8bit": AdamW8bit,
    "sgd": lambda p, **options: SGD(p, momentum=0.9, **options),
    "sgd, blind": lambda p, **options: SGD(p, check_finite=False, **options),
    "adafactor": Adafactor,
}


def made(name: str, dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], FusedOptimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((17, 33), (64,))]
    return params, MAKERS[name](params, lr=0.01)


def give(params: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> float:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None))


def everything(params: list[torch.nn.Parameter], optimizer: FusedOptimizer) -> list[Any]:
    state = optimizer.state_dict()["state"]
    return [p.detach().clone() for p in params] + [copy.deepcopy(state[i]) for i in sorted(state)]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_refused_leaves_no_trace_and_what_is_admitted_is_as_ever(
    name: str, dtype: torch.dtype
) -> None:
    asked: list[float] = []
    params, optimizer = made(name, dtype)
    plain_params, plain = made(name, dtype)
    for step in range(5):
        norm = give(params, step)
        give(plain_params, step)
        optimizer.step(admit=lambda value: asked.append(value) or True)  # type: ignore[func-returns-value]
        plain.step()
        assert asked[-1] == pytest.approx(norm, rel=1e-6)
        before = everything(params, optimizer)
        assert all(equal(x, y) for x, y in zip(before, everything(plain_params, plain), strict=True))
        norm = give(params, 50 + step, scale=1e3)
        optimizer.step(admit=lambda value: value < 1.0)
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6) and not optimizer.found_inf
        assert all(equal(x, y) for x, y in zip(before, everything(params, optimizer), strict=True))


def test_nobody_is_asked_about_gradients_that_are_not_finite() -> None:
    params, optimizer = made("adamw", torch.float32)
    give(params, 0, math.inf)
    optimizer.step(admit=lambda value: pytest.fail("asked"))
    assert optimizer.found_inf


def test_a_norm_from_outside_is_what_is_asked_about() -> None:
    params, optimizer = made("adamw", torch.float32)
    asked: list[float] = []
    give(params, 0)
    optimizer.step(grad_norm=(123.0, False), admit=lambda value: asked.append(value) or False)  # type: ignore[func-returns-value]
    assert asked == [123.0] and torch.equal(params[0], made("adamw", torch.float32)[0][0])
