from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptcore.ops.moe_router import (
    MoERouting,
    expert_capacity,
    moe_router,
    moe_router_backward,
    moe_router_reference,
)
from tests.strides import EDGES
from tests.tolerance import assert_close_to_exact, assert_same_for_threads, same_bits

DTYPES = [torch.float32, torch.bfloat16]
PLACES = ("experts", "rows", "offsets", "requested")


def gradient(routing: MoERouting, leaf: torch.Tensor) -> torch.Tensor:
    """By every differentiable output at once."""
    weights = torch.linspace(0.5, 1.5, routing.gates.numel()).view(routing.gates.shape)
    total = (routing.gates * weights).sum() + 0.3 * routing.balance_loss + 0.2 * routing.z_loss
    return torch.autograd.grad(total, leaf)[0]


def check(logits: torch.Tensor, edges: tuple[int, int] = (0, 0), **options: Any) -> MoERouting:
    leaf, exact_leaf, twin_leaf = (
        logits.detach().to(d).requires_grad_() for d in (None, torch.double, torch.float)
    )
    got = moe_router(torch.nn.functional.pad(leaf, edges)[:, edges[0] : edges[0] + leaf.shape[1]], **options)
    exact, twin = (moe_router_reference(x, **options) for x in (exact_leaf, twin_leaf))
    for name in PLACES:
        assert torch.equal(getattr(got, name), getattr(exact, name)), name
    size = logits.double().abs().max().item() + 1 if logits.numel() else 1.0
    tokens, experts = logits.shape
    for name, terms, summand in (
        ("gates", experts, 1.0), ("lse", experts, size), ("share", 1, 1.0), ("balance_loss", tokens, experts),
        ("z_loss", tokens, (size + 5) ** 2), ("entropy", tokens, size + 5),
    ):  # fmt: skip
        found, wanted, like = (getattr(r, name).detach() for r in (got, exact, twin))
        assert_close_to_exact(found, wanted, like.to(found.dtype), terms=terms, summand=summand, what=name)
    if logits.numel():
        found, wanted, like = gradient(got, leaf), gradient(exact, exact_leaf), gradient(twin, twin_leaf)
        assert found.dtype == logits.dtype
        assert_close_to_exact(
            found, wanted, like.to(found.dtype), terms=experts, summand=size + 5, what="dlogits"
        )
    return got


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_experts_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for experts in (*range(1, 19), 31, 64, 65, 128):
        for top_k in {1, min(2, experts), min(5, experts)}:
            check(torch.randn(37, experts).to(dtype), top_k=top_k, capacity=9)


def draw_capacity(data: Any, tokens: int, experts: int, top_k: int) -> int | None:
    """None, or what the convention says, in exact arithmetic: the factors have few bits."""
    factor = data.draw(st.sampled_from([None, 0.125, 0.25, 0.5, 1.0, 1.25, 2.0]))
    if factor is None:
        return None
    convention = data.draw(st.sampled_from(["per_token", "per_assignment"]))
    rounding, minimum = (
        data.draw(st.sampled_from(["up", "down", "nearest"])),
        data.draw(st.sampled_from([0, 1, 4])),
    )
    share = Fraction(factor) * tokens * (top_k if convention == "per_assignment" else 1) / experts
    whole = {"up": math.ceil, "down": math.floor, "nearest": round}[rounding](share)
    options: dict[str, Any] = {"convention": convention, "rounding": rounding, "minimum": minimum}
    if max(whole, minimum) == 0:
        with pytest.raises(ValueError, match="every token would be dropped"):
            expert_capacity(tokens, experts, factor=factor, top_k=top_k, **options)
        return 1
    assert expert_capacity(tokens, experts, factor=factor, top_k=top_k, **options) == max(whole, minimum)
    return max(whole, minimum)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), edges=EDGES, dtype=st.sampled_from(DTYPES))
def test_any_option(data: Any, edges: tuple[int, int], dtype: torch.dtype) -> None:
    """All of them together: choices, gates, capacity, priority, random second choices, padding and losses."""
    tokens, experts = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    spread = data.draw(st.sampled_from([0.1, 2.0, 20.0]))
    logits = torch.randn(tokens, experts, generator=generator).mul(spread).to(dtype)
    top_k = data.draw(st.integers(1, min(experts, 6)))
    options: dict[str, Any] = {
        "top_k": top_k,
        "capacity": draw_capacity(data, tokens, experts, top_k),
        "renormalise": data.draw(st.booleans()),
        "balance": data.draw(st.sampled_from(["first", "all"])),
    }
    if data.draw(st.booleans()):
        counted = data.draw(st.sampled_from([0.0, 0.3, 0.8]))
        options["mask"] = torch.rand(tokens, generator=generator) < counted
    kind = data.draw(st.sampled_from(["position", "gate", "permutation", "ties"]))
    if kind == "gate":
        options["priority"] = "gate"
        gaps = torch.softmax(logits.double(), -1).amax(-1).sort().values.diff()
        assume(bool((gaps > 1e-6).all()))  # else rounding decides who is first
    elif kind == "permutation":
        options["priority"] = torch.randperm(tokens, generator=generator).float()
    elif kind == "ties":
        options["priority"] = torch.randint(0, 9, (tokens,), generator=generator).float()
    if top_k > 1:
        options["second_choice"] = data.draw(st.sampled_from(["always", "gshard", "st_moe"]))
        options["uniforms"] = torch.rand(tokens, generator=generator)
    check(logits, edges, **options)


def test_of_equal_logits_the_lower_expert_is_chosen_first(isa: str) -> None:
    logits = torch.randint(-1, 2, (300, 9)).float()
    logits[logits == 0] *= torch.tensor([1.0, -1.0])[
        torch.randint(0, 2, (int((logits == 0).sum()),))
    ]  # 0 and -0
    for top_k in (1, 2, 3, 9):
        check(logits, top_k=top_k, capacity=40)
    assert moe_router(torch.full((1, 5), -float("inf")), top_k=3).experts.tolist() == [[0, 1, 2]]


def test_places_by_hand() -> None:
    """Four tokens want expert 0 first, expert 1 second; a fifth the other way round; two fit."""
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 4 + [[1.0, 2.0, 0.0]])
    routing = moe_router(logits, top_k=2, capacity=2)
    # expert 0 takes tokens 0 and 1; expert 1 the fifth's first choice before any second one, then token 0's
    assert routing.rows.tolist() == [[0, 3], [1, -1], [-1, -1], [-1, -1], [2, -1]]
    assert routing.offsets.tolist() == [0, 2, 4, 4] and routing.requested.tolist() == [5, 5, 0]
    assert float(routing.drop_rate) == pytest.approx(0.6) and float(routing.load) == pytest.approx(1.5)
    backwards = moe_router(logits, top_k=2, capacity=2, priority=torch.arange(5.0))
    assert backwards.rows.tolist() == [[-1, -1], [-1, -1], [1, -1], [0, 3], [2, -1]]


def test_second_choices_are_kept_with_their_probability() -> None:
    logits, uniforms = torch.randn(20000, 4), torch.rand(20000)
    gates = moe_router(logits).gates
    for name, threshold in (("gshard", 0.5), ("st_moe", 0.2)):
        kept = moe_router(logits, second_choice=name, uniforms=uniforms).rows[:, 1] >= 0
        assert torch.equal(kept, uniforms * threshold < gates[:, 1])
        expected = (gates[:, 1] / threshold).clamp(max=1).mean()
        assert abs(kept.float().mean() - expected) < 4 * (0.25 / 20000) ** 0.5


def test_losses_are_those_of_transformers_and_st_moe() -> None:
    modeling = pytest.importorskip(
        "transformers.models.mixtral.modeling_mixtral", reason="needs transformers"
    )
    logits, mask = torch.randn(2, 30, 8), torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    flat = logits.view(60, 8)
    for attention_mask in (None, mask):
        wanted = modeling.load_balancing_loss_func((flat,), 8, 2, attention_mask)
        kept = None if attention_mask is None else mask.view(-1).bool()
        got = moe_router(flat, balance="all", mask=kept)
        assert abs(got.balance_loss - wanted) <= 1e-6 * wanted
        rows = flat if kept is None else flat[kept]
        z = torch.logsumexp(rows, -1).square().mean()
        assert abs(got.z_loss - z) <= 1e-6 * z
        # ST-MoE, equation 3 and 4: shares of first choices, mean probabilities
        share = torch.bincount(rows.argmax(-1), minlength=8) / len(rows)
        first = 8 * (share * rows.softmax(-1).mean(0)).sum()
        assert abs(moe_router(flat, mask=kept).balance_loss - first) <= 1e-6 * first


def test_padding_changes_nothing() -> None:
    logits, mask = torch.randn(50, 6), torch.rand(50) > 0.4
    junk = logits.clone()
    junk[~mask] = float("nan")
    padded, alone = moe_router(junk, mask=mask, capacity=7), moe_router(logits[mask], capacity=7)
    for name in ("gates", "experts", "rows"):
        assert torch.equal(getattr(padded, name)[mask], getattr(alone, name))
    assert (padded.gates[~mask] == 0).all() and (padded.experts[~mask] == -1).all()
    assert torch.equal(padded.offsets, alone.offsets)
    assert abs(padded.balance_loss - alone.balance_loss) <= 1e-6
    leaf = junk.requires_grad_()
    found = gradient(moe_router(leaf, mask=mask), leaf)
    assert (found[~mask] == 0).all() and found.isfinite().all()


def test_edges_are_defined() -> None:
    for routing in (
        moe_router(torch.empty(0, 5)),
        moe_router(torch.randn(7, 5), mask=torch.zeros(7, dtype=torch.bool)),
    ):
        assert routing.offsets.tolist() == [0] * 6 and routing.requested.sum() == 0
        assert (
            routing.balance_loss
            == routing.z_loss
            == routing.entropy
            == routing.drop_rate
            == routing.load
            == 0
        )
    logits = torch.randn(40, 4096)
    assert moe_router(logits, top_k=64).rows.max() == 40 * 64 - 1
    leaf = torch.empty(0, 5, requires_grad=True)
    assert gradient(moe_router(leaf), leaf).shape == (0, 5)


@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("priority", [None, "gate", "values"])
@pytest.mark.parametrize("second_choice", ["always", "st_moe"])
def test_nothing_but_padding_under_every_option(tokens: int, priority: Any, second_choice: str) -> None:
    leaf = torch.full((tokens, 3), float("nan"), requires_grad=True)
    values = torch.rand(tokens) if priority == "values" else priority
    routing = moe_router(
        leaf, top_k=3, capacity=1, mask=torch.zeros(tokens, dtype=torch.bool), priority=values, balance="all",
        second_choice=second_choice, uniforms=torch.rand(tokens),
    )  # fmt: skip
    assert (routing.experts == -1).all() and (routing.rows == -1).all() and not routing.gates.any()
    assert not any(x.any() for x in (routing.requested, routing.offsets, routing.share))
    for number in (routing.balance_loss, routing.z_loss, routing.entropy, routing.drop_rate, routing.load):
        assert number == 0
    assert not gradient(routing, leaf).any()


def test_gradients_of_some_outputs_alone() -> None:
    leaf = torch.randn(20, 6, requires_grad=True)
    routing = moe_router(leaf, capacity=5)
    weights = torch.linspace(0.5, 1.5, 40).view(20, 2)
    parts = (routing.gates * weights).sum(), 0.3 * routing.balance_loss, 0.2 * routing.z_loss
    each = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in parts]
    torch.testing.assert_close(sum(each), gradient(routing, leaf))
    assert all(part.any() for part in each)
    assert not any(x.requires_grad for x in (routing.experts, routing.rows, routing.entropy, routing.lse))


def test_not_a_number(isa: str) -> None:
    logits = torch.randn(20, 6)
    clean = moe_router(logits)
    logits[3, 2], logits[5] = float("nan"), float("nan")
    routing = moe_router(logits)
    assert routing.gates[3].isnan().all() and 2 not in routing.experts[3].tolist()
    assert routing.experts[5].tolist() == [0, 1] and routing.gates[5].isnan().all()
    others = [n for n in range(20) if n not in (3, 5)]
    assert torch.equal(routing.gates[others], clean.gates[others])
    assert routing.balance_loss.isnan() and routing.z_loss.isnan() and routing.entropy.isnan()
    leaf = logits.requires_grad_()
    (dlogits,) = torch.autograd.grad(moe_router(leaf).gates.sum(), leaf)
    assert dlogits[others].isfinite().all() and not dlogits[[3, 5]].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_threads_and_runs(isa: str, threads: None, dtype: torch.dtype) -> None:
    logits = torch.randn(3000, 12).to(dtype)

    def outputs() -> list[torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        routing = moe_router(leaf, capacity=300, priority="gate")
        return [*(x.detach() for x in routing), gradient(routing, leaf)]

    assert_same_for_threads(outputs)
    alone = moe_router(logits[1500:1501])
    assert same_bits(alone.gates, moe_router(logits).gates[1500:1501])


def test_numpy_arrays_and_the_explicit_backward() -> None:
    logits = torch.randn(30, 7, requires_grad=True)
    wanted = moe_router(logits, capacity=8, renormalise=False)
    got = moe_router(logits.detach().numpy(), capacity=8, renormalise=False)
    assert isinstance(got.gates, np.ndarray)
    for ours, theirs in zip(got, wanted, strict=True):
        assert np.array_equal(ours, theirs.detach().numpy())
    assert float(got.drop_rate) == pytest.approx(float(wanted.drop_rate))
    dgates = np.ones((30, 2), np.float32)
    dlogits = moe_router_backward(dgates, 0.3, 0.2, logits.detach().numpy(), got, renormalise=False)
    (expected,) = torch.autograd.grad(
        wanted.gates.sum() + 0.3 * wanted.balance_loss + 0.2 * wanted.z_loss, logits
    )
    assert np.array_equal(dlogits, expected.numpy())


def test_opcheck_gradcheck_second_derivative_and_compile() -> None:
    leaf = torch.randn(9, 5, requires_grad=True)
    sample = (leaf, torch.ones(9, dtype=torch.bool), None, None, 2, True, False, 0.0, 3, False)
    torch.library.opcheck(torch.ops.gptcore.moe_router.default, sample)

    def reference(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = moe_router_reference(x, capacity=3)
        return routing.gates, routing.balance_loss, routing.z_loss

    torch.autograd.gradcheck(reference, torch.randn(6, 4, dtype=torch.double, requires_grad=True))
    (first,) = torch.autograd.grad(moe_router(leaf).z_loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()

    def loss(x: torch.Tensor) -> torch.Tensor:
        routing = moe_router(x * 2, capacity=4)
        return routing.gates[:, 0].sum() + routing.z_loss + routing.balance_loss

    eager, compiled = (leaf.detach().clone().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    assert same_bits(eager.grad, compiled.grad)


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        ({"factor": 1.25}, 160), ({"factor": 1.25, "convention": "per_assignment"}, 320), ({"factor": 0.01}, 2),
        ({"factor": 0.01, "minimum": 4}, 4), ({"factor": 0.011, "rounding": "down"}, 1),
        ({"factor": 0.012, "rounding": "nearest"}, 2),
        ({"factor": 2.0, "top_k": 1, "convention": "per_assignment"}, 256),
    ],
)  # fmt: skip
def test_capacity_conventions(options: dict[str, Any], capacity: int) -> None:
    assert expert_capacity(1024, 8, **options) == capacity


L = torch.randn(5, 4)
BAD = [
    (lambda: moe_router(L, top_k=5), ValueError, "'top_k': got 5 of 4 experts, expected 1 to 4"),
    (lambda: moe_router(L, top_k=0), ValueError, "'top_k': got 0 of 4"),
    (lambda: moe_router(L, capacity=0), ValueError, "'capacity': got 0, expected at least 1"),
    (lambda: moe_router(torch.randn(2, 4097)), ValueError, "4097 experts, expected 1 to 4096"),
    (lambda: moe_router(L[0]), ValueError, "'logits': got 1 dimensions"),
    (lambda: moe_router(L.double()), TypeError, "'logits': got float64"),
    (lambda: moe_router(L, mask=torch.ones(4, dtype=torch.bool)), ValueError, "'mask'"),
    (lambda: moe_router(L, mask=torch.ones(5)), TypeError, "'mask'"),
    (lambda: moe_router(L, priority=torch.ones(4)), ValueError, "'priority'"),
    (lambda: moe_router(L, second_choice="st_moe"), TypeError, "'uniforms': got None"),
    (lambda: moe_router(L, top_k=1, second_choice="gshard", uniforms=L[:, 0].contiguous()), ValueError, "top_k"),
    (lambda: moe_router(L, second_choice="gshrd"), Exception, "did you mean 'gshard'"),
    (lambda: moe_router(L, priority="gates"), Exception, "did you mean 'gate'"),
    (lambda: moe_router(L, balance="last"), Exception, "balance"),
    (lambda: expert_capacity(4, 8, factor=0.0), ValueError, "'factor': got 0.0"),
    (lambda: expert_capacity(4, 8, factor=0.5, rounding="down", minimum=0), ValueError, "every token would be dropped"),
    (lambda: expert_capacity(4, 8, factor=0.5, convention="per_tokens"), Exception, "did you mean 'per_token'"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_backward_refuses_tables_that_point_outside() -> None:
    routing = moe_router(L.numpy())
    for strange in (4, -2):
        experts = routing.experts.copy()
        experts[1, 1] = strange
        with pytest.raises(ValueError, match=f"'experts': got {strange} for token 1"):
            moe_router_backward(None, 1.0, 1.0, L.numpy(), routing._replace(experts=experts))
