from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.ops.moe_dispatch import (
    moe_combine,
    moe_combine_backward,
    moe_combine_reference,
    moe_dispatch,
    moe_dispatch_backward,
    moe_dispatch_reference,
)
from gptcore.ops.moe_router import MoERouting, moe_router
from tests.strides import EDGES
from tests.tolerance import assert_same_for_threads, check_against_float64, same_bits

DTYPES = [torch.float32, torch.bfloat16]


def routing_of(tokens: int, top_k: int = 2, *, experts: int = 5, capacity: int | None = None) -> MoERouting:
    routing = moe_router(torch.randn(tokens, experts), top_k=top_k, capacity=capacity)
    return routing._replace(gates=routing.gates.detach())


def check(tokens: int, width: int, dtype: torch.dtype, routing: MoERouting, edges: tuple[int, int] = (0, 0)):
    _, _, rows, offsets, *_ = routing
    choices = rows.numel()
    x, y = torch.randn(tokens, width).to(dtype), torch.randn(choices, width).to(dtype)
    grad, grad_sorted = torch.randn(tokens, width).to(dtype), torch.randn(choices, width).to(dtype)

    def run(kernel: Any, reference: Any, x: torch.Tensor, grad_out: torch.Tensor) -> None:
        def of_view(x: torch.Tensor) -> torch.Tensor:
            return kernel(torch.nn.functional.pad(x, edges)[:, edges[0] : edges[0] + width], rows, offsets)

        check_against_float64(
            of_view, lambda x: reference(x, rows, offsets), [x], [grad_out], terms=rows.shape[1], summand=4.0
        )

    run(moe_dispatch, moe_dispatch_reference, x, grad_sorted)
    run(moe_combine, moe_combine_reference, y, grad)
    check_against_float64(
        lambda y, gates: moe_combine(y, rows, offsets, gates.float()),
        lambda y, gates: moe_combine_reference(y, rows, offsets, gates.to(y.dtype)),
        [y, routing.gates], [grad], terms=width, summand=4.0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    routing = routing_of(9, capacity=3)
    for width in (*range(1, 36), 63, 64, 65, 127, 200):
        check(9, width, dtype, routing)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 60), width=st.integers(1, 90), top_k=st.integers(1, 5), dtype=st.sampled_from(DTYPES),
    capacity=st.sampled_from([None, 1, 4]), edges=EDGES,
)  # fmt: skip
def test_any_shape_and_stride(tokens, width, top_k, dtype, capacity, edges) -> None:
    check(tokens, width, dtype, routing_of(tokens, top_k, capacity=capacity), edges)


def test_a_token_goes_to_its_experts_and_comes_back() -> None:
    """Experts that multiply by their number + 1: the token times the mean of those, weighted by its gates."""
    x, routing = torch.randn(40, 6), routing_of(40)
    sorted_tokens = moe_dispatch(x, routing.rows, routing.offsets)
    counts = routing.offsets.diff()
    factor = torch.repeat_interleave(torch.arange(1.0, 6.0), counts)[:, None]
    out = moe_combine(sorted_tokens * factor, routing.rows, routing.offsets, routing.gates)
    expected = x * (routing.gates * (routing.experts + 1)).sum(1, keepdim=True)
    assert (out - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_dropped_choices_and_the_rows_after_the_last_are_zero() -> None:
    routing = routing_of(50, capacity=4)
    used = int(routing.offsets[-1])
    assert used < 100
    x = torch.randn(50, 7, requires_grad=True)
    sorted_tokens = moe_dispatch(x, routing.rows, routing.offsets)
    assert (sorted_tokens[used:] == 0).all() and (sorted_tokens[:used] != 0).all()
    junk = sorted_tokens.detach().clone()
    junk[used:] = float("nan")  # nobody reads them
    out = moe_combine(junk, routing.rows, routing.offsets, routing.gates)
    lost = (routing.rows < 0).all(1)
    assert lost.any() and (out[lost] == 0).all() and out.isfinite().all()
    dy, dgates = moe_combine_backward(torch.ones(50, 7), junk, routing.rows, routing.offsets, routing.gates)
    assert (dy[used:] == 0).all() and (dgates[routing.rows < 0] == 0).all() and dgates.isfinite().all()


def test_every_choice_dropped() -> None:
    """No row at all: zeros everywhere, and gradients of zero."""
    rows, offsets = torch.full((6, 2), -1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    x, gates = torch.randn(6, 3, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    there = moe_dispatch(x, rows, offsets)
    back = moe_combine(there, rows, offsets, gates)
    assert there.shape == (12, 3) and not there.any() and not back.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(back.sum(), (x, gates)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_threads_runs_and_batches(isa: str, threads: None, dtype: torch.dtype) -> None:
    routing, x = routing_of(600), torch.randn(600, 96).to(dtype)
    gates = routing.gates.requires_grad_()

    def outputs() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        there = moe_dispatch(leaf, routing.rows, routing.offsets)
        back = moe_combine(there, routing.rows, routing.offsets, gates)
        return [
            there.detach(),
            back.detach(),
            *torch.autograd.grad(back.float().square().sum(), (leaf, gates)),
        ]

    assert_same_for_threads(outputs)
    alone = moe_combine(
        moe_dispatch(x, routing.rows, routing.offsets),
        routing.rows[7:8].contiguous(),
        routing.offsets,
        gates[7:8],
    )
    assert same_bits(alone.detach(), outputs()[1][7:8])


def test_numpy_arrays_and_explicit_backward() -> None:
    routing, x, grad = routing_of(20), torch.randn(20, 9, requires_grad=True), torch.randn(20, 9)
    tables = routing.rows.numpy(), routing.offsets.numpy()
    gates = routing.gates.requires_grad_()
    there = moe_dispatch(x, routing.rows, routing.offsets)
    there.retain_grad()
    back = moe_combine(there, routing.rows, routing.offsets, gates)
    back.backward(grad)
    y = moe_dispatch(x.detach().numpy(), *tables)
    assert isinstance(y, np.ndarray) and np.array_equal(y, there.detach().numpy())
    assert np.array_equal(moe_combine(y, *tables, gates.detach().numpy()), back.detach().numpy())
    dy, dgates = moe_combine_backward(grad.numpy(), y, *tables, gates.detach().numpy())
    assert np.array_equal(dy, there.grad.numpy()) and np.array_equal(dgates, gates.grad.numpy())
    assert np.array_equal(moe_dispatch_backward(dy, tables[0]), x.grad.numpy())


def test_empty_batches() -> None:
    routing = routing_of(0)
    x = torch.empty(0, 4, requires_grad=True)
    there = moe_dispatch(x, routing.rows, routing.offsets)
    back = moe_combine(there, routing.rows, routing.offsets, routing.gates)
    assert there.shape == (0, 4) and back.shape == (0, 4)
    assert torch.autograd.grad(back.sum(), x)[0].shape == (0, 4)


def test_opcheck_gradcheck_and_compile() -> None:
    routing = routing_of(6, capacity=2)
    x, y = torch.randn(6, 3, requires_grad=True), torch.randn(12, 3, requires_grad=True)
    gates = routing.gates.requires_grad_()
    torch.library.opcheck(torch.ops.gptcore.moe_dispatch.default, (x, routing.rows, routing.offsets))
    torch.library.opcheck(torch.ops.gptcore.moe_combine.default, (y, routing.rows, routing.offsets, gates))
    torch.library.opcheck(torch.ops.gptcore.moe_combine.default, (y, routing.rows, routing.offsets, None))
    double = [t.detach().double().requires_grad_() for t in (y, gates)]
    torch.autograd.gradcheck(
        lambda y, gates: moe_combine_reference(y, routing.rows, routing.offsets, gates), double
    )

    def layer(x: torch.Tensor) -> torch.Tensor:
        there = moe_dispatch(x * 2, routing.rows, routing.offsets)
        return moe_combine(there * there, routing.rows, routing.offsets, routing.gates).sum()

    (eager,) = torch.autograd.grad(layer(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x), x)
    assert same_bits(eager, compiled)


R = routing_of(5)
X, Y = torch.randn(5, 4), torch.randn(10, 4)
BAD = [
    (lambda: moe_dispatch(X.double(), R.rows, R.offsets), TypeError, "'x': got float64"),
    (lambda: moe_dispatch(X, R.rows[:4].contiguous(), R.offsets), ValueError, "'rows'"),
    (lambda: moe_dispatch(X, R.rows.long(), R.offsets), TypeError, "'rows': got int64"),
    (lambda: moe_dispatch(X, R.rows + 1, R.offsets), ValueError, "'rows': got 10, expected -1 to 9"),
    (lambda: moe_dispatch(X, R.rows - 2, R.offsets), ValueError, "'rows': got -2"),
    (lambda: moe_dispatch(X, R.rows, R.offsets + 1), ValueError, "'offsets': got 11 at its end"),
    (lambda: moe_combine(Y, R.rows, R.offsets, R.gates[:, :1].contiguous()), ValueError, "'gates'"),
    (lambda: moe_combine(Y, R.rows, R.offsets, R.gates.double()), TypeError, "'gates': got float64"),
    (lambda: moe_combine(Y[:9], R.rows, R.offsets), ValueError, "'rows': got 9, expected -1 to 8"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
