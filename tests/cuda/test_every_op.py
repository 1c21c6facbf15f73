"""What every op promises on a GPU: the CPU's results to rounding, the same bits in every run, nothing left unwritten,
a place in a graph. On the processor's emulation too, as far as that goes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.cuda.op_cases import CASES, OpCase
from tests.tolerance import ROUNDOFF, same_bits

RUNS = 100
EACH = [pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}") for case in CASES for dtype in case.dtypes]


def _on(device: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(device) for x in inputs]


def _poison(device: str) -> None:
    """Fill memory that the allocator will hand out next with NaN: results that are not written everywhere show."""
    kept = [torch.full((1 << k,), float("nan"), device=device) for k in range(4, 22)]
    del kept


def _assert_agree(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, terms: int) -> None:
    """By 2-norm: each side rounds results once and intermediates (bf16 probabilities, score gradients) a few times, and
    sums of ``terms`` in f32 in orders of their own."""
    allowed = 8 * ROUNDOFF[dtype] + 8 * ROUNDOFF[torch.float32] * terms**0.5
    assert len(got) == len(expected)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        assert a.shape == b.shape and bool(a.isfinite().all()), f"result {place}"
        error = float((a - b).norm()) / max(float(b.norm()), 1e-30)
        assert error <= allowed, f"result {place}: {error:.2e} apart, {allowed:.2e} allowed"


def _agreement(case: OpCase, dtype: torch.dtype, device: str, isa: str | None = None) -> None:
    from gptcore import backend

    inputs = case.inputs(dtype)
    expected = case.run([x.clone() for x in inputs])
    before = backend.isa()
    if isa:
        backend.set_isa(isa)
    try:
        _poison(device)
        _assert_agree(case.run(_on(device, inputs)), expected, dtype, case.terms)
    finally:
        backend.set_isa(before)


@pytest.mark.parametrize(("case", "dtype"), EACH)
def test_agrees_with_the_processors_kernels_simt(simt: object, case: OpCase, dtype: torch.dtype) -> None:
    _agreement(case, dtype, "cpu", "simt")


@pytest.mark.parametrize(("case", "dtype"), EACH)
def test_same_bits_in_any_order_of_threads_simt(on_simt: None, case: OpCase, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    first = case.run([x.clone() for x in inputs])
    again = case.run([x.clone() for x in inputs])
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return "cuda"


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "dtype"), EACH)
def test_agrees_with_the_processors_kernels(gpu: str, case: OpCase, dtype: torch.dtype) -> None:
    _agreement(case, dtype, gpu)


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "dtype"), EACH)
def test_same_bits_in_a_hundred_runs(gpu: str, case: OpCase, dtype: torch.dtype) -> None:
    inputs = _on(gpu, case.inputs(dtype))
    first = case.run([x.clone() for x in inputs])
    for _ in range(RUNS - 1):
        again = case.run([x.clone() for x in inputs])
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "dtype"), EACH)
def test_a_graph_replays_the_eager_bits_for_new_numbers(gpu: str, case: OpCase, dtype: torch.dtype) -> None:
    static = _on(gpu, case.inputs(dtype))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.run([x.clone() for x in static])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(static)
    for _ in range(3):
        fresh = _on(gpu, case.inputs(dtype))
        for place, x in zip(static, fresh, strict=True):
            place.copy_(x)
        graph.replay()
        expected = case.run(fresh)
        assert all(same_bits(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "dtype"), EACH)
def test_runs_on_the_callers_stream(gpu: str, case: OpCase, dtype: torch.dtype) -> None:
    inputs = _on(gpu, case.inputs(dtype))
    expected = case.run([x.clone() for x in inputs])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # some 10 ms: what ran on another stream would be done long before
        late = [x * 0 if x.is_floating_point() else x for x in inputs]
        late = [a.copy_(b) for a, b in zip(late, inputs, strict=True)]
        got = case.run(late)
    side.synchronize()
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
