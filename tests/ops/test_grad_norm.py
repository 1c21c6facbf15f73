from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.ops.grad_norm import grad_norm, grad_norm_reference, square_sums, square_sums_reference
from tests.tolerance import ROUNDOFF, assert_same_for_threads, same_bits

# f32 partial sums over chunks of 16384 in 64 lanes: 256 roundings of half a unit at worst, a walk of 16.
BOUND = 16 * ROUNDOFF[torch.float32]
SIZES = [*range(0, 34), 63, 64, 65, 16383, 16384, 16385, 40000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    grads = [torch.randn(n).to(dtype) for n in SIZES]
    for chosen in ([g] for g in grads):
        assert grad_norm(chosen)[0] == pytest.approx(grad_norm_reference(chosen)[0], rel=BOUND)
    assert grad_norm(grads, 8.0)[0] == pytest.approx(grad_norm_reference(grads, 8.0)[0], rel=BOUND)


@given(
    sizes=st.lists(st.integers(0, 200), max_size=6),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_any_list_and_scale(sizes: list[int], exponent: int, seed: int) -> None:
    torch.manual_seed(seed)
    grads = [(torch.randn(n) * 10.0**exponent).to([torch.float32, torch.bfloat16][n % 2]) for n in sizes]
    norm, found_inf = grad_norm(grads)
    assert not found_inf and norm == pytest.approx(grad_norm_reference(grads)[0], rel=BOUND)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_elements_are_found_anywhere(isa: str, bad: float, dtype: torch.dtype) -> None:
    for position in (0, 16, 65, 20000, 39999):
        grads = [torch.ones(5), torch.randn(40000).to(dtype)]
        grads[1][position] = bad
        norm, found_inf = grad_norm(grads)
        assert found_inf and not math.isfinite(norm)


def test_same_bits_for_every_thread_count_and_run(threads: None) -> None:
    grads = [torch.randn(100_000), torch.randn(3).bfloat16(), torch.randn(40_000)]
    assert_same_for_threads(lambda: [torch.tensor(grad_norm(grads)[0], dtype=torch.float64)])


def test_numpy_and_no_tensors() -> None:
    assert grad_norm([np.array([3.0, 4.0], dtype=np.float32)]) == (5.0, False)
    assert grad_norm([]) == (0.0, False)


@pytest.mark.parametrize(
    ("grads", "scale", "error", "text"),
    [
        (
            [torch.zeros(2, dtype=torch.float64)],
            1.0,
            TypeError,
            "grad_norm: argument 'grads\\[0\\]': got float64",
        ),
        ([torch.zeros(4), torch.zeros(4)[::2]], 1.0, ValueError, "'grads\\[1\\]'.*contiguous"),
        ([None], 1.0, TypeError, "'grads\\[0\\]': got None"),
        ([torch.zeros(2)], 0.0, ValueError, "'grad_scale': got 0.0+, expected a finite number above 0"),
    ],
)
def test_bad_input_is_named(grads: list, scale: float, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        grad_norm(grads, scale)


# --- sums of blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 5, 256, 1024, 16384, 30000])
def test_sums_of_blocks_on_every_isa(isa: str, dtype: torch.dtype, block: int) -> None:
    sizes = SIZES[:38] if isa == "simt" and block < 256 else SIZES  # a sum is a warp's work
    grads = [torch.randn(n).to(dtype) for n in sizes]
    sums, found_inf = square_sums(grads, block, 8.0)
    want, _ = square_sums_reference(grads, block, 8.0)
    assert not found_inf and sums.shape == want.shape and sums.dtype == torch.float64
    torch.testing.assert_close(sums, want, rtol=2 * BOUND, atol=0)  # a norm's error is half of its square's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_that_begin_with_a_block_have_the_wholes_bits(isa: str, dtype: torch.dtype) -> None:
    whole = torch.randn(100_001).to(dtype)
    sums, _ = square_sums([whole])
    for cut in ([0, 100_001], [0, 1024, 3072, 100_001], [0, 50 * 1024, 50 * 1024, 97 * 1024, 100_001]):
        slices = [whole[a:b] for a, b in itertools.pairwise(cut)]
        one_by_one = [square_sums([s])[0] for s in slices]
        together, _ = square_sums([s.clone() for s in slices])  # and at another alignment
        assert same_bits(torch.cat(one_by_one), sums) and same_bits(together, sums)


def test_a_block_of_a_chunk_is_what_the_norm_adds_up() -> None:
    grads = [torch.randn(100_000), torch.randn(3).bfloat16(), torch.zeros(0)]
    sums, _ = square_sums(grads, 16384)
    assert math.sqrt(sum(sums.tolist())) == grad_norm(grads)[0]


def test_blocks_beyond_the_range_of_f32_are_summed_in_f64() -> None:
    grad = torch.zeros(5 * 1024)
    grad[1024:2048], grad[2048:3072], grad[3072:4096] = 1e-25, 1e25, 1.0
    sums, found_inf = square_sums([grad])
    exact = [0.0, *(1024 * torch.tensor(x).double().item() ** 2 for x in (1e-25, 1e25)), 1024.0, 0.0]
    assert not found_inf and sums.tolist() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_tell_where_elements_are_not_finite(isa: str, bad: float, dtype: torch.dtype) -> None:
    for position in (0, 16, 1023, 1024, 20_000, 39_999):
        grads = [torch.ones(5), torch.randn(40_000).to(dtype)]
        grads[1][position] = bad
        sums, found_inf = square_sums(grads)
        assert found_inf and (~sums.isfinite()).nonzero().flatten().tolist() == [1 + position // 1024]


def test_sums_have_the_same_bits_for_every_thread_count_and_run(threads: None) -> None:
    grads = [torch.randn(100_000), torch.randn(3).bfloat16(), torch.randn(40_000)]
    assert_same_for_threads(lambda: [square_sums(grads)[0]])


def test_sums_of_numpy_arrays_and_into_out() -> None:
    grads = [np.arange(5, dtype=np.float32)]
    sums, _ = square_sums(grads, 2)
    assert isinstance(sums, np.ndarray) and sums.tolist() == [1.0, 13.0, 16.0]
    out = torch.empty(3, dtype=torch.float64)
    assert square_sums(grads, 2, 2.0, out=out)[0] is out and out.tolist() == [0.25, 3.25, 4.0]
    assert square_sums([])[0].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"block": 0}, ValueError, "square_sums: argument 'block': got 0, expected 1 or more"),
        ({"grad_scale": math.inf}, ValueError, "'grad_scale'"),
        ({"out": torch.ones(4, dtype=torch.float64)}, ValueError, "'out': got shape \\(4,\\)"),
        ({"out": torch.ones(3)}, TypeError, "'out': got float32"),
        ({"grads": [torch.zeros(3072, dtype=torch.float16)]}, TypeError, "'grads\\[0\\]': got float16"),
    ],
)
def test_bad_input_of_sums_is_named_and_nothing_written(arguments: dict, error, text: str) -> None:
    arguments = {
        "grads": [torch.randn(3072)],
        "out": torch.ones(3, dtype=torch.float64),
        **arguments,
    }
    with pytest.raises(error, match=text):
        square_sums(**arguments)
    assert (arguments["out"] == 1).all()
