"""Attention's forward on CUDA: every option and head size in small shapes, against float64 and the CPU's dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore import backend
from gptcore.ops.attention import attention
from tests.cuda.attention_cases import DTYPES, check_forward, inputs

pytestmark = pytest.mark.usefixtures("on_simt")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 33, 64, 72, 96, 128, 160, 192, 250, 256])
def test_every_head_size(dtype: torch.dtype, size: int) -> None:
    check_forward(inputs((1, 37, 70, 1, 1, size), dtype), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 16), (2, 130, 130, 2, 1, 32), (1, 5, 200, 4, 2, 40), (1, 150, 20, 1, 1, 64)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (17, 3)},
        {"causal": True, "window_size": (40, -1)},
    ],
)
def test_every_shape_and_mask(dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    check_forward(inputs(shape, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 128])
@pytest.mark.parametrize(
    "name", ["soft_cap", "alibi", "bias", "narrow_bias", "mask", "sinks", "scale", "pattern", "fixed", "all"]
)
def test_every_option(dtype: torch.dtype, size: int, name: str) -> None:
    heads, queries, keys = 4, 45, 90
    tensors = inputs((2, queries, keys, heads, 2, size), dtype)
    mask = torch.rand(2, 1, queries, keys) < 0.7
    mask[0, 0, 3] = False
    options: dict[str, Any] = {
        "soft_cap": {"soft_cap": 2.0},
        "alibi": {"alibi_slopes": torch.rand(2, heads), "causal": True},
        "bias": {"attn_bias": torch.randn(heads, queries, keys)},
        "narrow_bias": {"attn_bias": torch.randn(1, 1, keys).to(dtype)},
        "mask": {"attn_mask": mask},
        "sinks": {"sinks": torch.tensor([0.5, -torch.inf, 3.0, -2.0]), "causal": True},
        "scale": {"softmax_scale": -0.3, "causal": True},
        "pattern": {"causal": True, "sparse_stride": 7},
        "fixed": {"causal": True, "sparse_stride": 16, "sparse_summary": 3},
        "all": {
            "causal": True,
            "soft_cap": 5.0,
            "alibi_slopes": torch.rand(heads),
            "attn_bias": torch.randn(queries, keys),
            "attn_mask": mask,
            "sinks": torch.randn(heads),
            "dropout_p": 0.3,
            "seed": 11,
            "prefix_lengths": torch.tensor([60, 3], dtype=torch.int32),
        },
    }[name]
    check_forward(tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 80, 128])
def test_what_is_dropped_is_what_the_processor_drops(dtype: torch.dtype, size: int) -> None:
    # Equal scores and unit vectors as values: the output shows what is dropped.
    keys = size
    q, k = torch.zeros(2, 70, 2, size, dtype=dtype), torch.zeros(2, keys, 2, size, dtype=dtype)
    v = torch.eye(keys, dtype=dtype)[None, :, None].expand(2, -1, 2, -1).contiguous()
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 2**40 + 5, "offset": 3}
    got = attention(q, k, v, **options)
    backend.set_isa("v2")
    wide = torch.float32 if dtype == torch.float16 else dtype
    expected = attention(q.to(wide), k.to(wide), v.to(wide), **options)
    assert torch.equal(got != 0, expected != 0)
    assert 0.5 < (got != 0).double().mean() < 0.7


def test_a_seed_is_read_when_the_kernel_runs() -> None:
    tensors = inputs((1, 20, 20, 1, 1, 16), torch.float32)
    by_number = attention(*tensors, dropout_p=0.5, seed=-3)
    assert torch.equal(attention(*tensors, dropout_p=0.5, seed=torch.tensor(-3)), by_number)


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents(dtype: torch.dtype) -> None:
    lengths, key_lengths = [1, 0, 150, 33, 20], [5, 9, 150, 0, 40]
    total, total_k = sum(lengths), sum(key_lengths)
    q, k, v = torch.randn(total, 4, 32), torch.randn(total_k, 2, 32), torch.randn(total_k, 2, 32)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, key_lengths))
    tensors = [x.to(dtype) for x in (q, k, v)]
    for options in (
        {"causal": True},
        {"causal": True, "prefix_lengths": torch.tensor([5, 0, 70, 0, 12], dtype=torch.int32)},
        {"window_size": (9, 4), "alibi_slopes": torch.rand(5, 4), "dropout_p": 0.2, "seed": 4},
    ):
        check_forward(tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)


def test_lengths_that_lie_do_not_lead_out_of_the_tensors() -> None:
    q, k, v = torch.randn(40, 1, 16), torch.randn(40, 1, 16), torch.randn(40, 1, 16)
    cu = torch.tensor([0, 30, 10, 2**31 - 1], dtype=torch.int32)
    attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=torch.tensor([0, -5, 90, 40], dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_rows_that_cannot_be_copied_by_16_bytes(dtype: torch.dtype) -> None:
    fused = torch.randn(2, 50, 3, 2, 19).to(dtype)
    q, k, v = fused.unbind(2)
    room = torch.full((2, 50, 2, 40), torch.nan, dtype=dtype)
    out = room[..., 7:26]
    attention(q, k, v, causal=True, out=out)
    assert torch.equal(out, attention(*(x.contiguous() for x in (q, k, v)), causal=True))
    assert room[..., :7].isnan().all() and room[..., 26:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_a_growing_maximum(dtype: torch.dtype) -> None:
    q, k, v = inputs((1, 20, 300, 1, 1, 16), dtype)
    k = k + torch.arange(300)[None, :, None, None].to(dtype) * 0.05
    q = q.abs() * 20
    scores = (q.double().flatten(0, 2) @ k.double().flatten(0, 2).mT).abs().max().item() / 4
    check_forward([q, k, v], scores=scores)
    check_forward([q, k, v], causal=True, scores=scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_the_rows_that_see_it(dtype: torch.dtype) -> None:
    q, k, v = inputs((1, 90, 90, 1, 1, 16), dtype)
    clean = attention(q, k, v, causal=True)
    k[0, 70, 0, 3] = torch.nan
    got = attention(q, k, v, causal=True)
    assert torch.equal(got[:, :70], clean[:, :70]) and got[:, 70:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_its_own_sequence_alone(dtype: torch.dtype) -> None:
    q, k, v = inputs((3, 66, 66, 2, 2, 64), dtype)
    got = attention(q, k, v, causal=True, soft_cap=9.0)
    assert torch.equal(got, attention(q, k, v, causal=True, soft_cap=9.0))
    assert torch.equal(got[1:2], attention(q[1:2], k[1:2], v[1:2], causal=True, soft_cap=9.0))
