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


def packed(
    queries: list[int], keys: list[int], heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Documents of so many queries and keys."""
    bounds = [torch.tensor([0, *counts]).cumsum(0).int() for counts in (queries, keys)]
    q = torch.randn(sum(queries), heads, size).to(dtype)
    k, v = (torch.randn(sum(keys), kv_heads, size).to(dtype) for _ in range(2))
    return [q, k, v], {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 1), (6, 2), (5, 1)], ids=str)
def test_packed_documents_of_a_few_queries(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """One of many queries among them, some of none, keys of none, of a part and of several."""
    queries, keys = [1, 0, 1, 23, 1, 0, 1, 1, 2], [300, 5, 1, 40, 0, 0, 64, 65, 700]
    tensors, bounds = packed(queries, keys, *heads, 32, dtype)
    for options in ({}, {"causal": True}, {"causal": True, "window_size": (20, 0)}):
        check_forward(tensors, **bounds, **options)
    options = {"causal": True, "soft_cap": 3.0, "sinks": torch.randn(heads[0])}
    check_forward(tensors, **bounds, **options, alibi_slopes=torch.rand(len(keys), heads[0]))
    lengths = torch.tensor([7, 5, 0, 30, 0, 0, 64, 1, 9], dtype=torch.int32)
    check_forward(tensors, **bounds, causal=True, prefix_lengths=lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_document_has_the_same_bits_whatever_lies_beside_it(dtype: torch.dtype) -> None:
    queries, keys = [1, 2, 1, 1], [70, 600, 3, 1100]
    (q, k, v), bounds = packed(queries, keys, 4, 2, 32, dtype)
    whole = attention(q, k, v, causal=True, **bounds)
    assert torch.equal(whole, attention(q, k, v, causal=True, **bounds))
    cu_q, cu_k = (x.tolist() for x in bounds.values())
    for i in range(len(queries)):
        alone = [q[cu_q[i] : cu_q[i + 1]], *(x[cu_k[i] : cu_k[i + 1]] for x in (k, v))]
        own = {
            name: torch.tensor([0, n]).int() for name, n in zip(bounds, (queries[i], keys[i]), strict=True)
        }
        assert torch.equal(attention(*alone, causal=True, **own), whole[cu_q[i] : cu_q[i + 1]])


def test_bounds_of_no_meaning_touch_nothing_beyond_the_tensors() -> None:
    """As the device would see them: nobody reads them on the host."""
    (q, k, v), bounds = packed([1, 1, 1], [40, 30, 20], 2, 1, 16, torch.float32)
    bounds["cu_seqlens_q"] = torch.tensor([0, 1 << 30, -9, 3], dtype=torch.int32)
    bounds["cu_seqlens_k"] = torch.tensor([5, -7, 1 << 30, 90], dtype=torch.int32)
    roomy = torch.full((5, 2, 16), 7.0)
    attention(q, k, v, **bounds, out=roomy[1:4])
    assert (roomy[0] == 7.0).all() and (roomy[4] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_the_rows_that_see_it(dtype: torch.dtype) -> None:
    q, k, v = inputs((1, 4, 300, 2, 1, 16), dtype)
    clean = attention(q, k, v, causal=True)
    k[0, 298] = torch.nan
    got = attention(q, k, v, causal=True)
    assert torch.equal(got[:, :2], clean[:, :2]) and got[:, 2:].isnan().all()
    assert attention(q, torch.full_like(k, torch.nan), v).isnan().all()
