"""Each variant of Adafactor against its own source, state that torch's own loads, guards and bits."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptcore import backend
from gptcore.ops.grad_norm import grad_norm
from gptcore.optim import Adafactor, schedule
from gptcore.optim.slices import Whole, join_blocks

SHAPES = [(130, 33), (64,), (1,), (5, 3, 2), (7, 1), ()]


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_grads(params: list[torch.nn.Parameter], step: int) -> None:
    """Exact in bf16, so that every dtype sees the same; of sizes a thousand apart, so that clips take hold."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator).bfloat16() * 10.0 ** (step % 4 - 2)
        p.grad = grad.bfloat16().to(p.dtype)


# --- the sources, in float64: formulas as they are published, sums for sums and means for means -------------------

Source = Callable[[torch.Tensor, torch.Tensor, dict[str, Any], int], torch.Tensor]


def rms(x: torch.Tensor) -> float:
    return math.sqrt(float(x.square().sum()) / x.numel())


def paper(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    """Shazeer, Stern 2018: algorithms 4 (matrices) and 5 (vectors) with the hyper-parameters of algorithm 6."""
    eps1, eps2, d, rho, beta = 1e-30, 1e-3, 1.0, min(1e-2, t**-0.5), 1 - t**-0.8
    alpha = max(eps2, rms(p)) * rho
    square = g * g + eps1
    if g.dim() > 1:
        state["R"] = beta * state.get("R", 0) + (1 - beta) * square.sum(-1, keepdim=True)
        state["C"] = beta * state.get("C", 0) + (1 - beta) * square.sum(-2, keepdim=True)
        v = state["R"] * state["C"] / state["R"].sum(-2, keepdim=True)
    else:
        v = state["V"] = beta * state.get("V", 0) + (1 - beta) * square
    u = g / v.sqrt()
    return p - alpha * u / max(1.0, rms(u) / d)


def transformers(**settings: Any) -> Source:
    """transformers.Adafactor as its documentation and step() have it."""
    o = {"beta1": None, "lr": None, "scale": True, "warmup": False, "decay": 0.0, "clip": 1.0, **settings}

    def step(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
        rate = o["lr"] or min(1e-6 * t if o["warmup"] else 1e-2, 1 / math.sqrt(t))
        lr = rate * (max(1e-3, rms(p)) if o["scale"] else 1.0)
        beta2 = 1.0 - math.pow(t, -0.8)
        square = g**2 + 1e-30
        if g.dim() >= 2:
            state["row"] = state.get("row", 0) * beta2 + square.mean(dim=-1) * (1 - beta2)
            state["col"] = state.get("col", 0) * beta2 + square.mean(dim=-2) * (1 - beta2)
            row = (state["row"] / state["row"].mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
            update = row * state["col"].unsqueeze(-2).rsqrt() * g
        else:
            state["sq"] = state.get("sq", 0) * beta2 + square * (1 - beta2)
            update = state["sq"].rsqrt() * g
        update = update / max(1.0, rms(update) / o["clip"]) * lr
        if o["beta1"] is not None:
            update = state["m"] = o["beta1"] * state.get("m", 0) + (1 - o["beta1"]) * update
        return p - o["decay"] * lr * p - update

    return step


def palm(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int, lr: float = 1e-2) -> torch.Tensor:
    """PaLM, section 5 (the global clip is the caller's): no factoring, momentum over the scaled update, lr^2."""
    beta2 = 1 - t**-0.8
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * (g * g + 1e-30)
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * lr * max(1e-3, rms(p)) * g / state["v"].sqrt()
    return (1 - lr**2) * p - state["m"]


SOURCES: dict[str, tuple[dict[str, Any], Source, float | None]] = {
    "paper": ({"variant": "paper"}, paper, None),
    "hf": ({"variant": "hf"}, transformers(), None),
    "hf_warmup_decay": (
        {"variant": "hf", "warmup_init": True, "weight_decay": 0.1, "beta1": 0.9, "clip_threshold": 0.5},
        transformers(warmup=True, decay=0.1, beta1=0.9, clip=0.5),
        None,
    ),
    "hf_own_rate": (
        {"variant": "hf", "lr": 1e-3, "relative_step": False, "scale_parameter": False},
        transformers(lr=1e-3, scale=False),
        None,
    ),
    "palm": ({"variant": "palm"}, palm, 1.0),
}


def follow(source: Source, steps: int, max_norm: float | None, dtype=torch.float32) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(p.detach().double()) for p in make_params(dtype)]
    states: list[dict[str, Any]] = [{} for _ in params]
    for t in range(1, steps + 1):
        set_grads(params, t)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        for p, state in zip(params, states, strict=True):
            assert p.grad is not None
            p.data = source(p.detach(), p.grad, state, t)
    return [p.detach() for p in params]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        set_grads(params, step)
        optimizer.step()


def assert_within_ulps(params, exact, before, ulps: float) -> None:
    """In units in the last place of the largest of old value, new value and step, element by element."""
    for p, want, old in zip(params, exact, before, strict=True):
        new, old = p.detach(), old.detach()
        larger = torch.maximum(torch.maximum(new.abs(), old.abs()), (new - old).abs())
        ulp = torch.nextafter(larger, torch.tensor(math.inf)) - larger
        error = ((new.double() - want).abs() / ulp.double()).max().item()
        assert error <= ulps, f"{error:.2f} ulp"


@pytest.mark.parametrize("name", SOURCES)
def test_one_step_is_the_sources_to_four_ulp(name: str) -> None:
    options, source, max_norm = SOURCES[name]
    params = make_params()
    train(Adafactor(params, **options), params, 1, 1)
    assert_within_ulps(params, follow(source, 1, max_norm), make_params(), 4)


@pytest.mark.parametrize("name", SOURCES)
def test_a_hundred_steps_are_the_sources(name: str) -> None:
    options, source, max_norm = SOURCES[name]
    params = make_params()
    train(Adafactor(params, **options), params, 1, 100)
    for p, want in zip(params, follow(source, 100, max_norm), strict=True):
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-5)


TORCH: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    {"d": 2.0, "beta2_decay": -0.5, "eps": (1e-3, 1e-2)},
]


@pytest.mark.parametrize("options", TORCH)
@pytest.mark.parametrize("foreach", [False, True])
def test_torch_variant_is_torchs(options: dict[str, Any], foreach: bool) -> None:
    eps = options.get("eps", (torch.finfo(torch.float32).eps, 1e-3))  # torch's default depends on the dtype
    params = make_params()
    exact = [torch.nn.Parameter(p.detach().double()) for p in params]
    ours = Adafactor(params, foreach=foreach, **options)
    theirs = torch.optim.Adafactor(exact, foreach=foreach, **{**options, "eps": eps})
    train(ours, params, 1, 1)
    train(theirs, exact, 1, 1)
    assert_within_ulps(params, [p.detach() for p in exact], make_params(), 4)
    train(ours, params, 2, 100)
    train(theirs, exact, 2, 100)
    for p, want in zip(params, exact, strict=True):
        torch.testing.assert_close(p.detach().double(), want.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_both_ways_between_torch_and_us(dtype: torch.dtype) -> None:
    """torch, ours from step 4 on, and torch again from step 7 on, beside torch alone."""
    alone, passed = make_params(dtype), make_params(dtype)
    reference = torch.optim.Adafactor(alone)
    train(reference, alone, 1, 9)
    first = torch.optim.Adafactor(passed)
    train(first, passed, 1, 3)
    second = Adafactor(passed, lr=99.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, passed, 4, 6)
    third = torch.optim.Adafactor(passed, lr=99.0)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    train(third, passed, 7, 9)
    assert third.param_groups[0]["lr"] == 1e-2 and float(third.state[passed[0]]["step"]) == 9
    # torch rounds every product of bf16 to it, and its state; we hold both in f32. A step is of 1%.
    tolerance = 1e-5 if dtype == torch.float32 else 9 * 2**-7
    for p, want in zip(passed, alone, strict=True):
        torch.testing.assert_close(p.detach(), want.detach(), rtol=tolerance, atol=tolerance)


def test_saved_state_has_torchs_keys() -> None:
    saved = []
    for cls in (Adafactor, torch.optim.Adafactor):
        params = make_params()
        optimizer = cls(params)
        train(optimizer, params, 1, 2)
        saved.append(optimizer.state_dict())
    assert saved[0]["param_groups"] == saved[1]["param_groups"]
    for i, state in saved[1]["state"].items():
        mine = saved[0]["state"][i]
        assert mine.keys() == state.keys()
        assert all(mine[name].shape == value.shape for name, value in state.items())


@pytest.mark.parametrize("variant", ["torch", "paper", "hf", "palm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_runs_go_on_bitwise(variant: str, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = Adafactor(params, variant=variant)
    train(optimizer, params, 1, 3)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = Adafactor(twin, variant=variant)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pickled = pickle.loads(pickle.dumps(optimizer))
    assert pickled.variant == variant and pickled.max_norm == optimizer.max_norm
    train(optimizer, params, 4, 6)
    train(restored, twin, 4, 6)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))
    if dtype == torch.bfloat16:
        for p in params:
            master = optimizer.state[p]["master"]
            assert master.dtype == torch.float32 and torch.equal(p.detach(), master.bfloat16())


def test_bf16_masters_follow_the_source() -> None:
    params = make_params(torch.bfloat16)
    optimizer = Adafactor(params, variant="paper")
    train(optimizer, params, 1, 20)
    for p, want in zip(params, follow(paper, 20, None, torch.bfloat16), strict=True):
        torch.testing.assert_close(optimizer.state[p]["master"].double(), want, rtol=1e-5, atol=1e-5)


def test_state_is_sublinear_but_for_palm() -> None:
    for variant, count in (
        ("torch", 130 + 33),
        ("paper", 130 + 33),
        ("hf", 130 + 33),
        ("palm", 2 * 130 * 33),
    ):
        params = make_params()
        optimizer = Adafactor(params, variant=variant)
        train(optimizer, params, 1, 1)
        state = optimizer.state[params[0]]
        assert sum(t.numel() for name, t in state.items() if name != "step") == count


def test_palm_follows_its_schedule() -> None:
    params = make_params()
    optimizer = Adafactor(params, variant="palm")
    for t in range(1, 8):
        optimizer.param_groups[0]["lr"] = schedule.inverse_sqrt(t - 1, peak=1e-2, warmup=3)
        train(optimizer, params, t, t)

    def source(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
        return palm(p, g, state, t, 1e-2 * math.sqrt(3 / max(t, 3)))

    for p, want in zip(params, follow(source, 7, 1.0), strict=True):
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-5)


def test_groups_of_different_settings_share_one_clip() -> None:
    params, twin = make_params(), make_params()
    split = Adafactor([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], max_norm=0.5)
    whole = Adafactor(twin, max_norm=0.5)
    train(split, params, 1, 3)
    train(whole, twin, 1, 3)
    assert split.last_grad_norm == pytest.approx(whole.last_grad_norm, rel=1e-6)
    for p, q in zip(params[:2], twin[:2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert not torch.equal(params[2], twin[2])


@pytest.mark.parametrize("variant", ["torch", "palm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_gradient_writes_nothing(variant: str, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = Adafactor(params, variant=variant)
    train(optimizer, params, 1, 2)
    before = copy.deepcopy((optimizer.state_dict()["state"], [p.detach() for p in params]))
    set_grads(params, 3)
    assert params[3].grad is not None
    params[3].grad[2, 1, 0] = math.nan
    optimizer.step()
    assert optimizer.found_inf and math.isnan(optimizer.last_grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before[1], params, strict=True))
    for i, state in before[0].items():
        for name, value in state.items():
            assert torch.equal(value, optimizer.state_dict()["state"][i][name]), name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"variant": "keras"}, "variant"),
        ({"lr": -1.0}, "lr"),
        ({"beta2_decay": 0.5}, "beta2_decay"),
        ({"eps": (None, -1.0)}, "eps"),
        ({"variant": "paper", "eps": (None, 1e-3)}, "eps"),
        ({"d": 0.5}, "d"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"beta1": 0.9}, "beta1"),
        ({"variant": "palm", "beta1": 1.0}, "beta1"),
        ({"variant": "hf", "lr": 1e-3}, "lr"),
        ({"variant": "hf", "relative_step": False}, "lr"),
        ({"variant": "hf", "lr": 1e-3, "relative_step": False, "warmup_init": True}, "warmup_init"),
        ({"variant": "hf", "decay_rate": 1.0}, "decay_rate"),
        ({"variant": "hf", "clip_threshold": 0.0}, "clip_threshold"),
    ],
)
def test_bad_settings(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Adafactor(make_params(), **options)


def test_state_of_another_variant_is_refused() -> None:
    params = make_params()
    palm_state = Adafactor(params, variant="palm").state_dict()
    with pytest.raises(ValueError, match="'state_dict'.*without d|foreach.*variant 'torch'"):
        Adafactor(params).load_state_dict(palm_state)


# --- slices with several owners ----------------------------------------------------------------------------------

CUT_SHAPES = [(640, 64), (3, 96, 32), (5000,), (7, 3), ()]
# Where slices of each may end: blocks of 48 rows, matrices, 1,024 elements.
CUTS = [
    [48 * 64, 240 * 64, 240 * 64],
    [96 * 32, 160 * 32, 2 * 96 * 32],
    [1024, 4096, 4096],
    [21] * 3,
    [1] * 3,
]
FLAT_CUTS = [[1024, 20 * 1024, 39 * 1024], [0, 1024, 8192], *CUTS[2:]]  # palm's


def _made(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in CUT_SHAPES]


def _owners(params: list[torch.nn.Parameter], cuts: list[list[int]]) -> list[list[torch.nn.Parameter]]:
    """Slice o of each parameter belongs to owner o; those of no elements are left out."""
    owned: list[list[torch.nn.Parameter]] = [[] for _ in range(4)]
    for number, (p, inner) in enumerate(zip(params, cuts, strict=True)):
        for own, (start, stop) in zip(owned, itertools.pairwise([0, *inner, p.numel()]), strict=True):
            if start < stop:
                own.append(torch.nn.Parameter(p.detach().view(-1)[start:stop].clone()))
                own[-1].whole = Whole(p.numel(), tuple(p.shape), start, number)  # type: ignore[attr-defined]
    return owned


def _step_together(optimizers: list[Adafactor], grad_norm: tuple[float, bool]) -> None:
    """What an all-gather between processes does, in one."""
    running = [optimizer.step_phases(grad_norm=grad_norm) for optimizer in optimizers]
    entries = [next(phases) for phases in running]
    for last in (False, True):
        joined = iter(join_blocks([entry for own in entries for entry in own]))
        for o, phases in enumerate(running):
            sent = [next(joined) for _ in entries[o]]
            if last:
                with pytest.raises(StopIteration):
                    phases.send(sent)
            else:
                entries[o] = phases.send(sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {"variant": "torch", "max_norm": 1.0, "weight_decay": 0.1},
    {"variant": "paper"},
    {"variant": "hf", "beta1": 0.9, "weight_decay": 0.1},
    {"variant": "palm", "d": 1.0},
])  # fmt: skip
def test_slices_of_several_owners_have_the_bits_of_one(
    threads: None, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """One optimizer of whole parameters, one of all slices, and four of a part of them, on 1 and 2 threads."""
    whole = _made(dtype)
    cuts = FLAT_CUTS if options["variant"] == "palm" else CUTS
    owned = _owners(whole, cuts)
    alone = [p for own in _owners(whole, cuts) for p in own]
    one, all_slices = Adafactor(whole, **options), Adafactor(alone, **options)
    one._always_in_blocks = True
    several = [Adafactor(own, **options) for own in owned]
    for step in range(1, 4):
        backend.set_num_threads(1 + step % 2)
        generator = torch.Generator().manual_seed(step)
        for number, p in enumerate(whole):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            for s in (s for s in itertools.chain(alone, *owned) if s.whole.number == number):
                s.grad = p.grad.view(-1)[s.whole.start : s.whole.start + s.numel()].clone()
        norm = grad_norm([p.grad for p in whole])
        one.step(grad_norm=norm)
        backend.set_num_threads(2 - step % 2)
        all_slices.step(grad_norm=norm)
        _step_together(several, norm)
        if step == 2:  # and after a file
            saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in several]
            several = [Adafactor(own, **options) for own in owned]
            for optimizer, state in zip(several, saved, strict=True):
                optimizer.load_state_dict(state)
    for number, p in enumerate(whole):
        for optimizers, params in (([all_slices], [alone]), (several, owned)):
            slices = [(o, s) for o, own in zip(optimizers, params, strict=True) for s in own]
            slices = sorted(
                ((o, s) for o, s in slices if s.whole.number == number), key=lambda x: x[1].whole.start
            )
            assert torch.equal(torch.cat([s.detach() for _, s in slices]), p.detach().view(-1)), number
            for name, value in one.state[p].items():
                pieces = [o.state[s][name] for o, s in slices]
                if name in ("step", "col_var"):
                    assert all(torch.equal(piece, value) for piece in pieces)
                else:
                    assert torch.equal(torch.cat([piece.view(-1) for piece in pieces]), value.view(-1)), name


def test_phases_do_nothing_where_a_gradient_is_not_finite() -> None:
    params = make_params()
    optimizer = Adafactor(params)
    set_grads(params, 1)
    before = [p.detach().clone() for p in params]
    assert list(optimizer.step_phases(grad_norm=(math.inf, True))) == []
    assert optimizer.found_inf and not optimizer.state
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_slice_alone_is_refused_before_anything_is_written() -> None:
    p = torch.nn.Parameter(torch.ones(1024))
    p.whole = Whole(4096, (64, 64), 1024, 3)  # type: ignore[attr-defined]
    p.grad = torch.ones(1024)
    optimizer = Adafactor([p])
    with pytest.raises(
        ValueError, match="Adafactor: .*1024 of the 4096 elements of parameter 3.*step_phases"
    ):
        optimizer.step()
    assert (p == 1).all() and not optimizer.state[p]["row_var"].any()
