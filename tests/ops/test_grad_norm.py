from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.ops.grad_norm import grad_norm, grad_norm_reference
from tests.tolerance import ROUNDOFF, assert_same_for_threads

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
