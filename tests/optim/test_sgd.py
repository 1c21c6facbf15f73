"""SGD against torch's: in float64, with its state going both ways, and its guards."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from gptcore import optim
from tests.optim.test_adamw import STEPS, make_params, set_grads
from tests.optim.test_torch_exchange import run, twin_of

LR = 0.01
FORMS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
]
# A step rounds the parameter (up to 4, half a unit of 2^-22) once, and the buffer (up to some 16) a few times by
# 2^-21, of which lr and up to 1 / (1 - momentum) steps make a tenth; torch as much.
PER_STEP = 2 * (2**-22 + LR * 10 * 3 * 2**-21)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_f32_and_bf16_masters_follow_torch_in_float64(form: dict[str, Any], max_norm: float | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = make_params(dtype)
        exact = [torch.nn.Parameter(p.detach().double()) for p in params]
        ours = optim.SGD(params, lr=LR, max_norm=max_norm, **form)
        theirs = torch.optim.SGD(exact, lr=LR, **form)
        for step in range(STEPS):
            set_grads(params, step)
            set_grads(exact, step)
            if max_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(exact, max_norm)
            ours.step()
            theirs.step()
            if max_norm is not None:
                assert ours.last_grad_norm == pytest.approx(float(norm), rel=1e-6)
        for p, want in zip(params, exact, strict=True):
            got = ours.state[p]["master"] if dtype == torch.bfloat16 else p.detach()
            torch.testing.assert_close(got.double(), want.detach(), rtol=0, atol=STEPS * PER_STEP)
            assert torch.equal(p.detach(), got.to(dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fused", [False, True])
def test_state_goes_both_ways(form: dict[str, Any], fused: bool) -> None:
    """Three runs of 7 steps: torch alone; torch, then ours from step 3; ours, then torch from step 3."""
    alone = make_params(torch.float32)
    torchs = torch.optim.SGD(alone, lr=LR, fused=fused, **form)
    run(torchs, alone, 0, 3)
    handed = twin_of(alone)
    goes_on = optim.SGD(handed, lr=99.0)
    goes_on.load_state_dict(copy.deepcopy(torchs.state_dict()))
    run(torchs, alone, 3, STEPS)
    run(goes_on, handed, 3, STEPS)

    back = make_params(torch.float32)
    first = optim.SGD(back, lr=LR, **form)
    run(first, back, 0, 3)
    assert first.state_dict()["param_groups"][0].keys() == torchs.state_dict()["param_groups"][0].keys()
    last = torch.optim.SGD(back, lr=99.0, fused=fused)
    last.load_state_dict(copy.deepcopy(first.state_dict()))
    run(last, back, 3, STEPS)
    for other in (handed, back):
        for p, q in zip(other, alone, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=STEPS * PER_STEP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_and_pickle_go_on_bitwise(dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = optim.SGD(params, lr=LR, momentum=0.9, max_norm=1.0, check_finite=False)
    run(optimizer, params, 0, 3)
    twin = twin_of(params)
    restored = optim.SGD(twin, lr=LR, momentum=0.9, max_norm=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pickled = pickle.loads(pickle.dumps(optimizer))
    assert pickled.check_finite is False and pickled.max_norm == 1.0
    own = pickled.param_groups[0]["params"]
    for each, its in ((optimizer, params), (restored, twin), (pickled, own)):
        run(each, its, 3, STEPS)
    for p, q, r in zip(params, twin, own, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


@pytest.mark.parametrize("different_lr", [False, True])
def test_a_non_finite_gradient_writes_nothing(different_lr: bool) -> None:
    params = make_params(torch.bfloat16)
    groups = [{"params": params[:2], "lr": 0.5 if different_lr else LR}, {"params": params[2:]}]
    optimizer = optim.SGD(groups, lr=LR, momentum=0.9)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    params[0].grad[3, 4] = math.nan
    optimizer.step()
    assert optimizer.found_inf and not math.isfinite(optimizer.last_grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert all("momentum_buffer" not in optimizer.state[p] for p in params)
    run(optimizer, params, 0, 1)
    assert not optimizer.found_inf and "momentum_buffer" in optimizer.state[params[0]]


@pytest.mark.parametrize("groups", [1, 2])
def test_without_the_check_there_is_no_norm(groups: int) -> None:
    params, twin = make_params(torch.float32), make_params(torch.float32)
    cut = 2 if groups == 2 else len(params)
    split = [{"params": params[:cut], "lr": 0.02}, {"params": params[cut:]}][:groups]
    optimizer = optim.SGD(split, lr=LR, momentum=0.9, check_finite=False)
    run(optimizer, params, 0, 2)
    assert optimizer.last_grad_norm is None
    split = [{"params": twin[:cut], "lr": 0.02}, {"params": twin[cut:]}][:groups]
    run(optim.SGD(split, lr=LR, momentum=0.9), twin, 0, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


def test_groups_added_later_start_their_own_buffer() -> None:
    params, twin = make_params(torch.float32), make_params(torch.float32)
    ours = optim.SGD(params[:2], lr=LR, momentum=0.9, dampening=0.5)
    theirs = torch.optim.SGD(twin[:2], lr=LR, momentum=0.9, dampening=0.5)
    for step in range(STEPS):
        if step == 2:
            ours.add_param_group({"params": params[2:]})
            theirs.add_param_group({"params": twin[2:]})
        for optimizer, its in ((ours, params), (theirs, twin)):
            run(optimizer, its, step, step + 1)
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=STEPS * PER_STEP)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "argument 'lr': got -1.0"),
        ({"momentum": -0.5}, "argument 'momentum'"),
        ({"weight_decay": math.inf}, "argument 'weight_decay'"),
        ({"dampening": 2.0}, "argument 'dampening': got 2.0, expected a number in"),
        ({"nesterov": True}, "argument 'nesterov': got True, expected a momentum above 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "argument 'nesterov'"),
        ({"differentiable": True}, "argument 'differentiable': got True"),
        ({"fused": True, "foreach": True}, "arguments 'fused' and 'foreach'"),
        ({"max_norm": 0.0}, "argument 'max_norm'"),
    ],
)
def test_bad_settings(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"SGD: {text}"):
        optim.SGD(make_params(torch.float32), **options)
