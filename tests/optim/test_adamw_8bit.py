"""AdamW8bit: what it keeps, where it goes, and that runs go on bit for bit."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from gptcore.optim import AdamW, AdamW8bit

SHAPES = [(64, 100), (4095,), (4096,), (1,), (5, 30, 40)]


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_grads(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master_weights", [False, True])
def test_state_is_of_the_promised_size(dtype: torch.dtype, master_weights: bool) -> None:
    params = make_params(dtype)
    optimizer = AdamW8bit(params, master_weights=master_weights)
    train(optimizer, params, 0, 2)
    for p in params:
        state = {name: t for name, t in optimizer.state[p].items() if name != "step"}
        masters = state.pop("master").numel() * 4 if "master" in state else 0
        got = sum(t.numel() * t.element_size() for t in state.values())
        small = p.numel() < 4096
        assert got == (8 * p.numel() if small else 2 * p.numel() + 8 * math.ceil(p.numel() / 256))
        kept = dtype == torch.bfloat16 and (master_weights or small)
        assert masters == (4 * p.numel() if kept else 0)


def test_small_tensors_are_adamws_bit_for_bit() -> None:
    ours, theirs = make_params()[1:4:2], make_params()[1:4:2]
    train(AdamW8bit(ours, max_norm=1.0), ours, 0, 5)
    train(AdamW(theirs, max_norm=1.0), theirs, 0, 5)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_first_step_is_adamws() -> None:
    """The moments are rounded after the update, so the first one knows nothing of it."""
    ours, theirs = make_params(), make_params()
    train(AdamW8bit(ours, lr=0.01, max_norm=1.0), ours, 0, 1)
    train(AdamW(theirs, lr=0.01, max_norm=1.0), theirs, 0, 1)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "master_weights"), [(torch.float32, True), (torch.bfloat16, False)])
def test_learns_as_adamw_does(dtype: torch.dtype, master_weights: bool) -> None:
    """Least squares from noisy gradients: the loss comes to within a fifth of AdamW's in f32."""
    losses = []
    for cls, kind, options in (
        (AdamW, torch.float32, {}),
        (AdamW8bit, dtype, {"master_weights": master_weights, "seed": 1}),
    ):
        generator = torch.Generator().manual_seed(3)
        target = torch.randn(64, 128, generator=generator) * 0.1
        w = torch.nn.Parameter(torch.zeros(64, 128, dtype=kind))
        optimizer = cls([w], lr=0.01, weight_decay=0.0, **options)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
            x = torch.randn(256, 64, generator=generator)
            error = x @ (w.detach().float() - target) + 0.1 * torch.randn(256, 128, generator=generator)
            w.grad = (x.T @ error / 256).to(kind)
            optimizer.step()
        losses.append((w.detach().float() - target).square().sum().item() / target.square().sum().item())
    assert losses[0] < 0.01 and losses[1] < 1.2 * losses[0] + 1e-5 + (1e-4 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master_weights", [False, True])
def test_restored_runs_go_on_bitwise(dtype: torch.dtype, master_weights: bool) -> None:
    params = make_params(dtype)
    optimizer = AdamW8bit(params, max_norm=1.0, master_weights=master_weights, seed=9)
    train(optimizer, params, 0, 3)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = AdamW8bit(twin, max_norm=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, twin, strict=True):
        for name, value in optimizer.state[p].items():
            assert value.dtype == restored.state[q][name].dtype, name
            assert torch.equal(value, restored.state[q][name]), name
    pickled = pickle.loads(pickle.dumps(optimizer))
    assert pickled.param_groups[0]["seed"] == 9
    train(optimizer, params, 3, 6)
    train(restored, twin, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master_weights", [False, True])
def test_a_non_finite_gradient_writes_nothing(dtype: torch.dtype, master_weights: bool) -> None:
    """In either of the two calls that large and small tensors take."""
    for index in (0, 3):
        params = make_params(dtype)
        optimizer = AdamW8bit(params, max_norm=1.0, master_weights=master_weights)
        train(optimizer, params, 0, 2)
        before = copy.deepcopy((optimizer.state_dict()["state"], [p.detach() for p in params]))
        set_grads(params, 2)
        grad = params[index].grad
        assert grad is not None
        grad.view(-1)[0] = math.nan
        optimizer.step()
        assert optimizer.found_inf and math.isnan(optimizer.last_grad_norm)
        assert all(torch.equal(a, b) for a, b in zip(before[1], params, strict=True))
        for i, state in before[0].items():
            for name, value in state.items():
                assert torch.equal(value, optimizer.state_dict()["state"][i][name]), name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"seed": -1}, "seed"),
        ({"max_norm": 0.0}, "max_norm"),
    ],
)
def test_bad_settings(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"argument '{named}'"):
        AdamW8bit(make_params(), **options)


def test_float64_parameters_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(5000, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    for master_weights in (False, True):
        with pytest.raises(TypeError, match="float64"):
            AdamW8bit([p], master_weights=master_weights).step()
