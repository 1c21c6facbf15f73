"""Our Adam and AdamW in place of torch's: the same arguments, the same saved state, the same trajectories."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch

from gptcore import optim
from tests.optim.test_adamw import STEPS, make_params, set_grads

LR = 0.01
# Both sides round the parameter (up to 4) once or twice a step, half a unit of 2^-22 each, and the quotient
# m / sqrt(v), of about 1 here, by some 10 roundings of 2^-24; ours and torch's add up.
PER_STEP = 2 * (2**-22 + LR * 10 * 2**-24)
PAIRS = [(optim.Adam, torch.optim.Adam), (optim.AdamW, torch.optim.AdamW)]
OPTIONS = [
    {"amsgrad": a, "maximize": m, "weight_decay": w}
    for a, m, w in itertools.product([False, True], [False, True], [0.0, 0.1])
]


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()


def twin_of(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_agree(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], steps: int) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=steps * PER_STEP)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_state_goes_both_ways(ours: Any, theirs: Any, options: dict[str, Any], fused: bool) -> None:
    """Three runs of 7 steps: torch alone; torch, then ours from step 3; ours, then torch from step 3."""
    alone = make_params(torch.float32)
    optimizer = theirs(alone, lr=LR, fused=fused, **options)
    run(optimizer, alone, 0, 3)
    handed = twin_of(alone)
    goes_on = ours(handed, lr=99.0)
    goes_on.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, alone, 3, STEPS)
    run(goes_on, handed, 3, STEPS)
    assert_agree(handed, alone, STEPS - 3)

    back = make_params(torch.float32)
    first = ours(back, lr=LR, **options)
    run(first, back, 0, 3)
    last = theirs(back, lr=99.0, fused=fused)
    last.load_state_dict(copy.deepcopy(first.state_dict()))
    run(last, back, 3, STEPS)
    assert_agree(back, alone, STEPS)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_saved_state_has_torchs_keys(ours: Any, theirs: Any, amsgrad: bool) -> None:
    saved = []
    for cls in (ours, theirs):
        params = make_params(torch.float32)
        optimizer = cls(params, lr=LR, amsgrad=amsgrad)
        run(optimizer, params, 0, 2)
        saved.append(optimizer.state_dict())
    mine, torchs = saved
    assert mine["param_groups"] == torchs["param_groups"]
    assert mine["state"].keys() == torchs["state"].keys()
    for i, state in torchs["state"].items():
        assert mine["state"][i].keys() == state.keys()
        for name, value in state.items():
            other = mine["state"][i][name]
            assert (other.dtype, other.shape) == (value.dtype, value.shape), name
            # Two steps: some roundings on numbers up to the tensor's size, (4 g)^2 at most.
            torch.testing.assert_close(other, value, rtol=0, atol=1e-6 if name != "step" else 0)


def test_saved_state_survives_a_file_with_weights_only() -> None:
    params = make_params(torch.bfloat16)
    optimizer = optim.AdamW(params, lr=LR, max_norm=1.0)
    run(optimizer, params, 0, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = twin_of(params)
    restored = optim.AdamW(twin, lr=LR, max_norm=1.0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, params, 2, STEPS)
    run(restored, twin, 2, STEPS)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["master"], restored.state[q]["master"])
        for p, q in zip(params, twin, strict=True)
    )


def test_torchs_bf16_state_becomes_f32_with_a_master() -> None:
    params = make_params(torch.bfloat16)
    torchs = torch.optim.AdamW(params, lr=LR)
    run(torchs, params, 0, 2)
    ours = optim.AdamW(params, lr=LR)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    before = [p.detach().float() for p in params]
    assert {t.dtype for p in params for t in ours.state[p].values()} == {torch.float32}
    set_grads(params, 2)
    ours.step()
    for p, old in zip(params, before, strict=True):
        # From the weight as it was: one update is at most lr (1 - beta1) / sqrt(1 - beta2) and a decay of 1e-4.
        moved = (ours.state[p]["master"] - old).abs()
        assert (moved <= LR * (0.1 / 0.001**0.5 + 1e-2 * old.abs()) + 2**-22).all()
        assert torch.equal(p.detach(), ours.state[p]["master"].bfloat16())


@pytest.mark.parametrize("saver", [False, True])
@pytest.mark.parametrize("loader", [False, True])
def test_split_masters_go_on_as_whole_ones(saver: bool, loader: bool) -> None:
    """Saved by one kind and loaded by the other, against a run of whole masters that never stopped."""
    whole = make_params(torch.bfloat16)
    straight = optim.AdamW(whole, lr=LR, max_norm=1.0, split_master=False)
    run(straight, whole, 0, STEPS)
    params = make_params(torch.bfloat16)
    optimizer = optim.AdamW(params, lr=LR, max_norm=1.0, split_master=saver)
    run(optimizer, params, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    assert {t.dtype for state in saved["state"].values() for t in state.values()} == {torch.float32}
    assert {"master", "step", "exp_avg", "exp_avg_sq"} == saved["state"][0].keys()
    assert ("master_low" in optimizer.state[params[0]]) == saver
    twin = twin_of(params)
    restored = optim.AdamW(twin, lr=LR, max_norm=1.0, split_master=loader)
    restored.load_state_dict(saved)
    assert restored.state_dict()["state"][0].keys() == saved["state"][0].keys(), "before the first step too"
    run(restored, twin, 3, STEPS)
    assert ("master" in restored.state[twin[0]]) != loader
    final = restored.state_dict()["state"]
    for i, (p, q) in enumerate(zip(whole, twin, strict=True)):
        master = straight.state[p]["master"]
        assert torch.equal(final[i]["master"], master)
        ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(p.detach()[~ties], q.detach()[~ties])


def test_split_masters_take_two_bytes_less_and_survive_a_pickle() -> None:
    params = make_params(torch.bfloat16)
    sizes = []
    for split in (False, True):
        optimizer = optim.AdamW(params, lr=LR, split_master=split)
        run(optimizer, params, 0, 2)
        sizes.append(
            sum(t.nbytes for p in params for name, t in optimizer.state[p].items() if name != "step")
        )
    assert sizes[0] - sizes[1] == 2 * sum(p.numel() for p in params)
    other = pickle.loads(pickle.dumps(optimizer))
    twin = other.param_groups[0]["params"]
    run(optimizer, params, 2, 4)
    run(other, twin, 2, 4)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


def test_a_weight_written_between_steps_takes_effect_with_split_masters() -> None:
    p = torch.nn.Parameter(torch.randn(100).bfloat16())
    optimizer = optim.AdamW([p], lr=LR, split_master=True, weight_decay=0.0)
    p.grad = torch.randn(100).bfloat16()
    optimizer.step()
    with torch.no_grad():
        p[:50] = 0.0
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.isfinite().all() and not p[:50].any() and p[50:].all()


def test_state_of_older_versions_with_a_plain_step() -> None:
    params = make_params(torch.bfloat16)
    optimizer = optim.AdamW(params, lr=LR)
    run(optimizer, params, 0, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        state["step"] = int(state["step"])
    keys = ("lr", "betas", "eps", "weight_decay", "params")
    old["param_groups"] = [{k: group[k] for k in keys} for group in old["param_groups"]]
    twin = twin_of(params)
    restored = optim.AdamW(twin)
    restored.load_state_dict(old)
    run(optimizer, params, 3, STEPS)
    run(restored, twin, 3, STEPS)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))
    assert restored.state[twin[0]]["step"] == STEPS


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_of_the_object_go_on_alike(how: str) -> None:
    params = make_params(torch.bfloat16)
    optimizer = optim.AdamW(params, lr=LR, max_norm=0.5, amsgrad=True)
    run(optimizer, params, 0, 2)
    set_grads(params, 2)
    optimizer.accumulate()  # a sum of one micro-batch must come along too
    other = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
    twin = other.param_groups[0]["params"]
    assert other.max_norm == 0.5 and other.found_inf is False
    for each in (optimizer, other):
        each.step()
    assert other.last_grad_norm == optimizer.last_grad_norm > 0
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(params, twin, strict=True) if p.numel())


def test_groups_added_later_are_clipped_by_the_same_norm() -> None:
    params = make_params(torch.float32)
    twin = twin_of(params)
    ours = optim.AdamW(params[:2], lr=LR, max_norm=0.5)
    theirs = torch.optim.AdamW(twin[:2], lr=LR)
    for step in range(STEPS):
        if step == 2:
            ours.add_param_group({"params": params[2:], "lr": 0.002, "amsgrad": True})
            theirs.add_param_group({"params": twin[2:], "lr": 0.002, "amsgrad": True})
        own = params if step >= 2 else params[:2]
        set_grads(params, step)
        set_grads(twin, step)
        torch.nn.utils.clip_grad_norm_(twin[: len(own)], 0.5)
        ours.step()
        theirs.step()
    # The clip factors differ by 16 roundings of 2^-24 at most; Adam's quotient does not feel a common factor.
    assert_agree(params, twin, STEPS)
    with pytest.raises(ValueError, match="AdamW: argument 'betas'"):
        ours.add_param_group({"params": twin[:1], "betas": (0.9, 1.0)})
    assert len(ours.param_groups) == 2


def test_the_norm_and_the_clip_do_not_depend_on_the_groups() -> None:
    together, apart = make_params(torch.float32), make_params(torch.float32)
    one = optim.AdamW(together, lr=LR, max_norm=0.5)
    # Different numbers, so calls of their own, and the same ones in the kernel's f32.
    groups = [{"params": [p], "eps": 1e-8 * (1 + i * 1e-12)} for i, p in enumerate(apart)]
    many = optim.AdamW(groups, lr=LR, max_norm=0.5)
    run(one, together, 0, 3)
    run(many, apart, 0, 3)
    assert one.last_grad_norm == many.last_grad_norm
    assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))


def test_the_learning_rate_may_be_a_tensor() -> None:
    params, twin = make_params(torch.float32), make_params(torch.float32)
    ours = optim.AdamW(params, lr=torch.tensor(LR))
    plain = optim.AdamW(twin, lr=float(torch.tensor(LR)))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, plain)]
    for step in range(3):
        set_grads(params, step)
        set_grads(twin, step)
        for optimizer, scheduler in zip((ours, plain), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


def test_hooks_of_torch_are_called() -> None:
    params = make_params(torch.float32)
    optimizer = optim.Adam(params, lr=LR)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(optimizer, params, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())

    def halve(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        first = {k: v / 2 if k == "exp_avg" else v for k, v in state["state"][0].items()}
        return {**state, "state": {**state["state"], 0: first}}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after"]
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], saved["state"][0]["exp_avg"] / 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"differentiable": True}, "argument 'differentiable': got True, expected False"),
        ({"capturable": True}, "argument 'capturable': got True, expected False"),
        ({"fused": True, "foreach": True}, "arguments 'fused' and 'foreach': got True for both"),
        ({"lr": torch.ones(2)}, "argument 'lr': got a tensor of 2 elements, expected one number"),
        ({"betas": (0.9,)}, "argument 'betas'"),
    ],
)
@pytest.mark.parametrize("cls", [optim.Adam, optim.AdamW])
def test_what_the_kernel_does_not_have_is_refused(cls: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}: {text}"):
        cls(make_params(torch.float32), **options)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}])
def test_torchs_choice_of_implementation_changes_nothing(options: dict[str, Any]) -> None:
    params, twin = make_params(torch.float32), make_params(torch.float32)
    run(optim.AdamW(params, lr=LR, **options), params, 0, 2)
    run(optim.AdamW(twin, lr=LR), twin, 0, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))
