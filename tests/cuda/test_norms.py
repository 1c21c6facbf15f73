"""Norms on CUDA: every way a row is cut over packs, threads and clusters."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from gptcore.ops.layer_norm import layer_norm, layer_norm_backward, layer_norm_reference, layer_norm_stats
from gptcore.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_reference, rms_norm_stats
from tests.tolerance import check_against_float64, same_bits

DTYPES = [torch.float32, torch.bfloat16]
NORMS = {
    "layer": (layer_norm, layer_norm_reference, layer_norm_stats, layer_norm_backward),
    "rms": (rms_norm, rms_norm_reference, rms_norm_stats, rms_norm_backward),
}


# Clusters, from sm_90 on, and what takes their place before.
ARCHES = pytest.mark.parametrize("arch", ["sm80", "sm90"], indirect=True)
pytestmark = pytest.mark.usefixtures("on_simt")


@pytest.fixture
def arch(simt: ModuleType, request: pytest.FixtureRequest) -> None:
    if f"sm{simt.arch()}" != request.param:
        pytest.skip(f"GPTCORE_SIMT_ARCH is {simt.arch()}")


def _check(kind: str, dtype: torch.dtype, rows: int, width: int, weight: torch.Tensor) -> None:
    norm, reference, _, _ = NORMS[kind]
    vectors = [weight, weight.flip(0)] if kind == "layer" else [weight]
    # Gradients that both types hold, and sums that are exact: what is rounded where is another test's business.
    grads = [torch.randint(-40, 41, (rows, width)) / 16 for _ in range(2)]
    x, residual = (torch.randint(-40, 41, (rows, width)).div(16).to(dtype) for _ in range(2))

    def rounded(function):
        def call(x, r, *v):
            return tuple(t.to(x.dtype) for t in function(x, *v, residual=r, weight_offset=0.5))

        return call

    check_against_float64(
        rounded(norm),
        rounded(reference),
        [x, residual, *vectors],
        grads,
        terms=width,
        summand=16.0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
# A lane a row, 2 to 16, a warp with 1, 2, 3 and 4 or 8 packs a thread, then rows of several warps.
@pytest.mark.parametrize("packs", [1, 2, 5, 16, 31, 40, 65, 100, 128, 129, 500])
def test_rows_of_every_cut(kind: str, dtype: torch.dtype, packs: int) -> None:
    width = packs * 16 // dtype.itemsize
    _check(kind, dtype, 5, width, torch.randn(width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
# More than the emulated device has at a time: lanes of a warp with rows that do not exist, and every kind of block.
@pytest.mark.parametrize(("rows", "packs"), [(400, 5), (31, 65), (60, 65), (40, 129)])
def test_blocks_stay_for_many_rows(kind: str, dtype: torch.dtype, rows: int, packs: int) -> None:
    width = packs * 16 // dtype.itemsize
    _check(kind, dtype, rows, width, torch.randn(width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("width", [16640, 33001])
@ARCHES
def test_wide_rows(arch: None, kind: str, dtype: torch.dtype, width: int) -> None:
    # Forward shares them over clusters from sm_90 on, backward over larger ones; sm_80 reads them again.
    _check(kind, dtype, 3, width, torch.randn(width).to(dtype))


@pytest.mark.parametrize("kind", NORMS)
@ARCHES
def test_rows_wider_than_a_cluster(arch: None, kind: str) -> None:
    _check(kind, torch.float32, 2, 66000, torch.randn(66000))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("width", [24, 100, 1000, 4104])
@ARCHES
def test_a_row_does_not_know_its_batch_or_its_place(
    arch: None, kind: str, dtype: torch.dtype, width: int
) -> None:
    norm, _, stats, backward = NORMS[kind]
    x, grad = torch.randn(2, 37, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    y, dx = norm(x, weight), backward(grad, x, weight, stats(x))[0]
    for row in (0, 17, 36):
        one = slice(row, row + 1)
        assert same_bits(y[one], norm(x[one], weight))
        assert same_bits(dx[one], backward(grad[one], x[one], weight, stats(x[one]))[0])
    # One element off the packs' alignment, and rows further apart than they are wide.
    moved = torch.empty(37 * (width + 3) + 1, dtype=dtype)[1:].view(37, width + 3)[:, :width]
    moved.copy_(x)
    assert same_bits(y, norm(moved, weight))
    for a, b in zip(
        backward(grad, x, weight, stats(x)), backward(grad, moved, weight, stats(moved)), strict=True
    ):
        assert a is b is None or same_bits(a, b)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("rows, width", [(0, 40), (1, 8), (64, 64), (3000, 16), (700, 264), (300, 1100)])
def test_sums_over_rows_in_any_number_of_blocks(kind: str, rows: int, width: int) -> None:
    norm, reference, _, _ = NORMS[kind]
    x, weight, grad = torch.randn(rows, width), torch.randn(width), torch.randn(rows, width)
    check_against_float64(norm, reference, [x, weight], [grad], terms=max(rows, width), summand=8.0)
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        results.append(torch.autograd.grad(norm(*leaves), leaves, grad))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", NORMS)
def test_special_values_stay_in_their_row(kind: str) -> None:
    norm, _, stats, backward = NORMS[kind]
    x, grad, weight = torch.randn(9, 40), torch.randn(9, 40), torch.randn(40)
    y, dx = norm(x, weight), backward(grad, x, weight, stats(x))[0]
    x[4, 3], x[7, 39] = float("nan"), float("inf")
    bad_y, bad_dx = norm(x, weight), backward(grad, x, weight, stats(x))[0]
    assert bad_y[4].isnan().all() and bad_dx[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 8]
    assert same_bits(bad_y[others], y[others]) and same_bits(bad_dx[others], dx[others])


def test_in_place_over_either_summand() -> None:
    x, residual, weight = torch.randn(5, 136), torch.randn(5, 136), torch.randn(136)
    y, h = rms_norm(x, weight, residual=residual)
    place = x.clone()
    assert same_bits(rms_norm(place, weight, out=place), rms_norm(x, weight))
    assert same_bits(h, x + residual) and same_bits(y, rms_norm(h, weight))
