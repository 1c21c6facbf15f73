"""Few queries over many keys on CUDA: keys split over blocks and warps, all heads of a key head in one tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore.ops.attention import attention
from tests.cuda.attention_cases import DTYPES, check_forward, inputs

pytestmark = pytest.mark.usefixtures("on_simt")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",  # batch, queries, keys, heads, key heads, size
    [
        (1, 1, 1, 1, 1, 8),
        (2, 1, 700, 4, 2, 64),
        (1, 3, 257, 8, 1, 40),
        (1, 16, 64, 3, 1, 33),
        (1, 2, 300, 2, 2, 128),
        (1, 1, 70, 2, 1, 256),
        (1, 9, 5, 2, 1, 16),
    ],
)
def test_every_shape_and_mask(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = inputs(shape, dtype)
    for options in (
        {},
        {"causal": True},
        {"window_size": (20, 0)},
        {"causal": True, "window_size": (290, -1)},
    ):
        check_forward(tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 5])
def test_every_option(dtype: torch.dtype, queries: int) -> None:
    heads, keys = 6, 330
    tensors = inputs((2, queries, keys, heads, 2, 48), dtype)
    mask = torch.rand(2, 1, queries, keys) < 0.7
    mask[0, 0, -1] = False
    mask[1, 0, 0, :256] = False  # a whole part
    common: dict[str, Any] = {"causal": True}
    for options in (
        {"soft_cap": 2.0},
        {"alibi_slopes": torch.rand(2, heads)},
        {"attn_bias": torch.randn(heads, queries, keys)},
        {"attn_bias": torch.randn(1, 1, keys).to(dtype)},
        {"attn_mask": mask},
        {"sinks": torch.tensor([0.5, -torch.inf, 3.0, -2.0, 9.0, 0.0]), "attn_mask": mask},
        {"softmax_scale": -0.3},
        {"prefix_lengths": torch.tensor([330, 7], dtype=torch.int32)},
    ):
        check_forward(tensors, **common, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    q, k, v = inputs((3, 2, 600, 4, 2, 32), dtype)
    whole = attention(q, k, v, causal=True)
    assert torch.equal(whole, attention(q, k, v, causal=True))
    assert torch.equal(attention(q[1:2], k[1:2], v[1:2], causal=True), whole[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_behind_the_keys_does_not_matter(dtype: torch.dtype) -> None:
    q, k, v = inputs((2, 1, 70, 4, 2, 64), dtype)
    roomy = [torch.full((2, 160, 3, 64), torch.nan, dtype=dtype) for _ in range(2)]
    for room, x in zip(roomy, (k, v), strict=True):
        room[:, :70, :2] = x
    got = attention(q, *(room[:, :70, :2] for room in roomy), causal=True)
    assert torch.equal(got, attention(q, k, v, causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_the_rows_that_see_it(dtype: torch.dtype) -> None:
    q, k, v = inputs((1, 4, 300, 2, 1, 16), dtype)
    clean = attention(q, k, v, causal=True)
    k[0, 298] = torch.nan
    got = attention(q, k, v, causal=True)
    assert torch.equal(got[:, :2], clean[:, :2]) and got[:, 2:].isnan().all()
    assert attention(q, torch.full_like(k, torch.nan), v).isnan().all()
