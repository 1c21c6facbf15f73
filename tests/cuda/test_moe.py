"""Experts' kernels for CUDA, run by the processor (tests/simt): what the processor's kernels have no part in."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gptcore import backend
from gptcore.ops.grouped_linear import grouped_linear, grouped_linear_backward
from gptcore.ops.moe_dispatch import moe_combine, moe_combine_backward, moe_dispatch
from gptcore.ops.moe_router import MoERouting, moe_router
from tests.ops.test_moe_router import PLACES, check, gradient
from tests.tolerance import same_bits

DTYPES = [torch.float32, torch.bfloat16]


def on_processor(function: Any, *arguments: Any) -> Any:
    backend.set_isa(next(isa for isa in reversed(backend.available_isas()) if isa != "simt"))
    try:
        return function(*arguments)
    finally:
        backend.set_isa("simt")


def assert_same_places(routing: MoERouting, wanted: MoERouting) -> None:
    for name in PLACES:
        assert torch.equal(getattr(routing, name), getattr(wanted, name)), name


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_option_of_the_router(on_simt: None, data: Any, dtype: torch.dtype) -> None:
    tokens, experts = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.randn(tokens, experts, generator=generator).mul(
        data.draw(st.sampled_from([0.1, 2.0, 20.0]))
    )
    top_k = data.draw(st.integers(1, min(experts, 7)))
    options: dict[str, Any] = {
        "top_k": top_k,
        "capacity": data.draw(st.sampled_from([None, 1, 3, 20])),
        "renormalise": data.draw(st.booleans()),
        "balance": data.draw(st.sampled_from(["first", "all"])),
    }
    if data.draw(st.booleans()):
        options["mask"] = torch.rand(tokens, generator=generator) < data.draw(
            st.sampled_from([0.0, 0.3, 0.8])
        )
    kind = data.draw(st.sampled_from(["position", "gate", "ties"]))
    if kind == "gate":
        options["priority"] = "gate"
        gaps = torch.softmax(logits.to(dtype).double(), -1).amax(-1).sort().values.diff()
        assume(bool((gaps > 1e-6).all()))  # else rounding decides who is first
    elif kind == "ties":
        options["priority"] = torch.randint(-2, 5, (tokens,), generator=generator).float() * 0.5
    if top_k > 1:
        options["second_choice"] = data.draw(st.sampled_from(["always", "gshard", "st_moe"]))
        options["uniforms"] = torch.rand(tokens, generator=generator)
    check(logits.to(dtype), **options)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    # a chunk, several; more chunks than are kept apart; every way to share out lanes and warps; the limits
    [
        (1, 1, 1),
        (97, 8, 8),
        (17000, 8, 2),
        (300, 9, 2),
        (60, 256, 8),
        (40, 1100, 3),
        (33, 2100, 2),
        (34, 4096, 64),
    ],
)
def test_choices_and_rows_are_those_of_the_processor(
    on_simt: None, tokens: int, experts: int, top_k: int
) -> None:
    logits = torch.randint(-40, 40, (tokens, experts)).float() / 8  # with many ties
    options: dict[str, Any] = {"top_k": top_k, "capacity": max(1, tokens * top_k // experts)}
    routing = moe_router(logits, **options)
    wanted = on_processor(lambda: moe_router(logits, **options))
    assert_same_places(routing, wanted)
    for name in ("gates", "lse", "share", "balance_loss", "z_loss", "entropy"):
        torch.testing.assert_close(getattr(routing, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)
    leaf = logits.requires_grad_()
    found = gradient(moe_router(leaf, **options), leaf)
    expected = on_processor(lambda: gradient(moe_router(leaf, **options), leaf))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 63, 65, 2048, 2049, 5000])
def test_priorities_over_several_tiles_of_keys(on_simt: None, tokens: int) -> None:
    """Ties, both zeros, infinities and NaN: the order that the processor sorts them into."""
    priority = torch.randint(-50, 50, (tokens,)).float()
    priority[torch.rand(tokens) < 0.1] = float("nan")
    priority[torch.rand(tokens) < 0.1] *= -0.0
    priority[torch.rand(tokens) < 0.05] = -float("inf")
    logits = torch.randn(tokens, 3)

    def route() -> MoERouting:
        return moe_router(logits, top_k=2, capacity=max(1, tokens // 4), priority=priority)

    assert_same_places(route(), on_processor(route))


def test_every_output_of_the_router_is_written(on_simt: None) -> None:
    tokens, experts, top_k = 41, 11, 3
    logits, mask = torch.randn(tokens, experts), torch.rand(tokens) < 0.7
    wanted = moe_router(logits, top_k=top_k, capacity=5, mask=mask)
    outputs = [torch.full_like(x, -77) if not x.is_floating_point() else torch.full_like(x, float("nan"))
               for x in wanted]  # fmt: skip
    gates, chosen, *others = outputs
    backend.extension().moe_router_forward(
        logits, mask, None, None, True, False, 0.0, 5, False, chosen, gates, *others
    )
    assert all(same_bits(got, x) for got, x in zip(outputs, wanted, strict=True))


def test_rows_behind_the_last_and_gradients_are_written_over_what_was_there(on_simt: None) -> None:
    for dtype in DTYPES:
        for width in (5, 64, 72, 1100):
            routing = moe_router(torch.randn(50, 6), top_k=2, capacity=7)
            rows, offsets, gates = routing.rows, routing.offsets, routing.gates
            x, dout = torch.randn(50, width).to(dtype), torch.randn(50, width).to(dtype)
            out, dy = (torch.full((100, width), float("nan")).to(dtype) for _ in range(2))
            dgates = torch.full((50, 2), float("nan"))
            extension = backend.extension()
            extension.moe_dispatch_forward(x, rows, offsets, out)
            extension.moe_combine_backward(dout, out, rows, gates, offsets, dy, dgates)
            wanted = on_processor(moe_dispatch, x, rows, offsets)
            assert same_bits(out, wanted)
            by_processor = on_processor(moe_combine_backward, dout, wanted, rows, offsets, gates)
            assert same_bits(dy, by_processor[0])
            torch.testing.assert_close(dgates, by_processor[1], rtol=1e-4, atol=1e-4)
            back = moe_combine(out, rows, offsets, gates)
            expected = on_processor(moe_combine, wanted, rows, offsets, gates)
            torch.testing.assert_close(back, expected)


def grouped_inputs(
    sizes: list[int], inner: int, outer: int, dtype: torch.dtype, rest: int = 0
) -> tuple[Any, ...]:
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    rows = int(offsets[-1]) + rest
    x, dy = torch.randn(rows, inner).to(dtype), torch.randn(rows, outer).to(dtype)
    return x, torch.randn(len(sizes), outer, inner).to(dtype), offsets, torch.randn(len(sizes), outer), dy


def check_groups(x: Any, weight: Any, offsets: Any, bias: Any, dy: Any) -> None:
    """Every result over what was there before, against the processor's."""
    y, dx = torch.full_like(dy, float("nan")), torch.full_like(x, float("nan"))
    extension = backend.extension()
    extension.grouped_linear(x, weight, offsets, bias, y)
    wanted = on_processor(lambda: grouped_linear(x, weight, offsets, bias=bias))
    close = {"rtol": 2e-2, "atol": 2e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(y, wanted, **close)
    for accumulate, to in ((False, x.dtype), (True, torch.float32), (True, x.dtype)):
        start = torch.full(weight.shape, 1.5 if accumulate else float("nan")).to(to)
        dweight, dbias = start.clone(), torch.full_like(bias, float("nan"))
        extension.grouped_linear_backward(dy, x, weight, offsets, dx, dweight, dbias, accumulate)
        wanted = on_processor(
            lambda start=start, accumulate=accumulate: grouped_linear_backward(
                dy, x, weight, offsets, bias=bias, out=start, accumulate=accumulate
            )
        )
        for got, expected in zip((dx, dweight, dbias), wanted, strict=True):
            torch.testing.assert_close(
                got, expected, **(close | {"atol": 0.1} if to != torch.float32 else close)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_groups(on_simt: None, dtype: torch.dtype) -> None:
    """Empty groups, several in a row; groups that end before, at and behind a tile's end; rows behind the last."""
    check_groups(*grouped_inputs([0, 0, 128, 1, 0, 127, 129, 0, 7, 0], 40, 136, dtype, rest=3))
    check_groups(*grouped_inputs([0, 0, 0], 16, 8, dtype, rest=5))
    check_groups(*grouped_inputs([0, 3], 9, 130, dtype))


def test_many_groups(on_simt: None) -> None:
    sizes = torch.randint(0, 3, (70,)).tolist()
    check_groups(*grouped_inputs(sizes, 8, 8, torch.bfloat16, rest=1))


def test_ragged_groups_sm90(sm90: ModuleType) -> None:
    """Hopper's kernels: boxes that hold the next group's rows, which are NaN here, behind the tensor's end, and behind
    the depth's; results between two tiles of columns."""
    check_groups(*grouped_inputs([0, 70, 130, 0, 64, 1, 0], 72, 264, torch.bfloat16, rest=3))
    check_groups(*grouped_inputs([0, 0], 16, 8, torch.bfloat16, rest=5))
    x, weight, offsets, _, dy = grouped_inputs([70, 5, 60], 64, 128, torch.bfloat16)
    y, (dx, dweight, _) = grouped_linear(x, weight, offsets), grouped_linear_backward(dy, x, weight, offsets)
    x[70:75], dy[70:75] = float("nan"), float("nan")
    again, gradients = grouped_linear(x, weight, offsets), grouped_linear_backward(dy, x, weight, offsets)
    others = [*range(70), *range(75, 135)]
    assert same_bits(again[others], y[others]) and same_bits(gradients[0][others], dx[others])
    assert same_bits(gradients[1][[0, 2]], dweight[[0, 2]]) and gradients[1][1].isnan().all()
    alone = torch.tensor([0, 9], dtype=torch.int32)
    assert same_bits(grouped_linear(x[80:89], weight[2:], alone), y[80:89])


def test_a_layer_of_experts_has_all_its_kernels() -> None:
    if backend.cuda_extension() is None:
        pytest.skip("gptcore was built without CUDA")
    assert {"moe_router", "moe_dispatch", "grouped_linear"} <= backend.cuda_kernels()
