"""AdamW against torch's in float64, its guards, and bitwise restoring of its state."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from gptcore.optim import AdamW, decay_groups

SHAPES = [(17, 33), (64,), (1,), (5, 3, 2), (0, 4)]
STEPS = 7


def make_params(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_grads(params: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator).bfloat16().float()
        p.grad = (grad * scale).to(p.dtype)


def groups_of(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}]


def oracle(dtype: torch.dtype, max_norm: float | None, **options: Any) -> list[torch.Tensor]:
    """torch.optim.AdamW in float64 from the same start and gradients."""
    params = [torch.nn.Parameter(p.detach().double()) for p in make_params(dtype)]
    optimizer = torch.optim.AdamW(groups_of(params), **options)
    for step in range(STEPS):
        set_grads(params, step)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
    return [p.detach() for p in params]


def train(optimizer: AdamW, params: list[torch.nn.Parameter], first: int = 0, last: int = STEPS) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99)])
def test_f32_against_torch_in_float64(max_norm: float | None, betas: tuple[float, float]) -> None:
    """An update is of size lr = 0.01; f32 rounds the parameter (up to 4) to 2^-22 once a step, and the
    update itself by some 10 roundings of 2^-24 relative."""
    params = make_params(torch.float32)
    train(AdamW(groups_of(params), lr=0.01, betas=betas, max_norm=max_norm), params)
    tolerance = STEPS * (2**-22 + 0.01 * 10 * 2**-24)
    for p, want in zip(params, oracle(torch.float32, max_norm, lr=0.01, betas=betas), strict=True):
        torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=tolerance)


def test_bf16_keeps_f32_masters() -> None:
    """The master follows the float64 run as closely as f32 does; the parameter is its rounding."""
    params = make_params(torch.bfloat16)
    optimizer = AdamW(groups_of(params), lr=1e-4)
    train(optimizer, params)
    tolerance = STEPS * (2**-22 + 1e-4 * 10 * 2**-24)
    for p, want in zip(params, oracle(torch.bfloat16, None, lr=1e-4), strict=True):
        master = optimizer.state[p]["master"]
        torch.testing.assert_close(master.double(), want, rtol=0, atol=tolerance)
        assert torch.equal(p.detach(), master.bfloat16())
    # Steps of 1e-4 vanish in bf16 weights near 1: without a master nothing would have moved.
    assert not torch.equal(optimizer.state[params[0]]["master"], make_params(torch.bfloat16)[0].float())


def test_groups_of_different_lr_share_one_clip() -> None:
    params = make_params(torch.float32)
    twin = [torch.nn.Parameter(p.detach().double()) for p in params]
    ours = AdamW([{"params": params[:2], "lr": 0.01}, {"params": params[2:], "lr": 0.002}], max_norm=0.5)
    theirs = torch.optim.AdamW([{"params": twin[:2], "lr": 0.01}, {"params": twin[2:], "lr": 0.002}])
    for step in range(STEPS):
        set_grads(params, step)
        set_grads(twin, step)
        norm = torch.nn.utils.clip_grad_norm_(twin, 0.5)
        ours.step()
        theirs.step()
        assert ours.last_grad_norm == pytest.approx(float(norm), rel=1e-6)
    for p, want in zip(params, twin, strict=True):
        torch.testing.assert_close(p.detach().double(), want.detach(), rtol=0, atol=STEPS * 2**-21)


def test_grad_norm_and_grad_scale() -> None:
    """Gradients 8 times as large with grad_scale 8 (a power of two, so exact) give the same bits."""
    plain, scaled = make_params(torch.float32), make_params(torch.float32)
    one, two = AdamW(plain, max_norm=1.0), AdamW(scaled, max_norm=1.0)
    set_grads(plain, 0)
    set_grads(scaled, 0, scale=8.0)
    one.step()
    two.step(grad_scale=8.0)
    want = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain if p.grad is not None))
    assert one.last_grad_norm == pytest.approx(want, rel=1e-6)
    assert one.last_grad_norm == two.last_grad_norm
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("different_lr", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_gradient_writes_nothing(bad: float, different_lr: bool, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    groups = groups_of(params)
    if different_lr:
        groups[0]["lr"] = 0.5
    optimizer = AdamW(groups, max_norm=1.0)
    train(optimizer, params, 0, 2)
    before = copy.deepcopy((optimizer.state_dict()["state"], [p.detach() for p in params]))
    set_grads(params, 2)
    assert params[3].grad is not None
    params[3].grad[2, 1, 0] = bad
    optimizer.step()
    assert optimizer.found_inf and not math.isfinite(optimizer.last_grad_norm)
    after = (optimizer.state_dict()["state"], [p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    for i, state in before[0].items():
        for name, value in state.items():
            same = torch.equal(value, after[0][i][name]) if name != "step" else value == after[0][i][name]
            assert same, (i, name)
    train(optimizer, params, 3, 4)
    assert not optimizer.found_inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_bitwise(dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = AdamW(groups_of(params), lr=3e-4, max_norm=1.0)
    train(optimizer, params, 0, 3)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = AdamW(groups_of(twin), lr=3e-4, max_norm=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, twin, strict=True):
        for name, value in optimizer.state[p].items():
            other = restored.state[q][name]
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype == torch.float32 and torch.equal(value, other)
            else:
                assert value == other
    train(optimizer, params, 3, STEPS)
    train(restored, twin, 3, STEPS)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


def test_load_copies() -> None:
    """Later steps of the restored optimizer must not write into the dict it was loaded from."""
    params = make_params(torch.float32)
    optimizer = AdamW(params)
    train(optimizer, params, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = saved["state"][0]["exp_avg"].clone()
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1, 2)
    assert torch.equal(saved["state"][0]["exp_avg"], kept)


def test_accumulate_sums_bf16_gradients_in_f32() -> None:
    """1 + 2^-9 + 2^-9 is 1 in bf16 additions and 1 + 2^-8 in f32."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=0.0)
    for _ in range(2):  # twice: the second step must not see sums of the first
        for value in (1.0, 2.0**-9, 2.0**-9):
            p.grad = torch.full_like(p, value)
            optimizer.accumulate()
            assert p.grad is None
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_grad_norm == pytest.approx(math.sqrt(3) * (1 + 2.0**-8), rel=1e-6)
    optimizer.step()
    assert optimizer.last_grad_norm == 0.0


def test_accumulate_leaves_f32_to_autograd() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], lr=0.0)
    for _ in range(3):
        p.square().sum().backward()
        optimizer.accumulate()
    optimizer.step()
    assert optimizer.last_grad_norm == pytest.approx(6 * math.sqrt(2), rel=1e-6)


def test_parameters_without_gradient_stay() -> None:
    params = make_params(torch.float32)
    optimizer = AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert params[1] not in optimizer.state
    assert torch.equal(params[1], make_params(torch.float32)[1])
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_closure_and_lr_scheduler() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_same_bits_for_every_thread_count(threads: int) -> None:
    def run(count: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(300, 517, generator=generator)) for _ in range(3)]
        optimizer = AdamW(params, max_norm=0.1)
        torch.set_num_threads(count)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return [p.detach() for p in params]

    threads_before = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(threads), strict=True))
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"max_norm": 0.0}, "max_norm"),
    ],
)
def test_bad_settings(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"argument '{named}'"):
        AdamW(make_params(torch.float32), **options)


def test_float64_parameters_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(TypeError, match="float64"):
        AdamW([p]).step()


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.frozen = torch.nn.Parameter(torch.zeros(3, 3), requires_grad=False)
        self.head = torch.nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


def test_decay_groups() -> None:
    groups = decay_groups(Tied(), 0.1)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert names == [["embedding.weight"], ["norm.weight", "norm.bias", "head.bias"]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    optimizer = AdamW(groups, lr=1e-3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]


def test_decay_groups_errors() -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        decay_groups(Tied(), -0.1)
    with pytest.raises(ValueError, match="no parameter"):
        decay_groups(torch.nn.Identity(), 0.1)
    assert len(decay_groups(torch.nn.Linear(2, 2, bias=False), 0.1)) == 1
