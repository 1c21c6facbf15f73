from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gptcore.ops.attention import attention, attention_qkv, attention_reference
from tests.ops.attention_oracle import (
    DTYPES,
    assert_same_in_every_run,
    check,
    check_compiled,
    check_ops,
    gradients_of,
    inputs,
    shapes_for,
    size_for,
)
from tests.ops.test_attention import SHAPES
from tests.tolerance import same_bits

# (stride, summary): summary 0 is the strided pattern. Blocks that are visited whole, in part, not at all; strides below
# a vector, no power of two, above every block.
PATTERNS = [
    (1, 0),
    (5, 0),
    (48, 0),
    (128, 0),
    (1000, 0),
    (1, 1),
    (7, 2),
    (64, 8),
    (128, 32),
    (100, 100),
    (1000, 3),
]


def _pattern(stride: int, summary: int) -> dict[str, Any]:
    return {"causal": True, "sparse_stride": stride, "sparse_summary": summary}


def _seen(queries: int, keys: int, stride: int, summary: int) -> torch.Tensor:
    """(T, S) bool, pair by pair as the paper writes it."""
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for t in range(queries):
        i = t + keys - queries
        for j in range(min(i + 1, keys)):
            if summary == 0:
                seen[t, j] = i - j <= stride or (i - j) % stride == 0
            else:
                seen[t, j] = j // stride == i // stride or j % stride in range(stride - summary, stride)
    return seen


def _torch_sparse(q: Any, k: Any, v: Any, *, sparse_stride: int, sparse_summary: int, causal: bool) -> Any:
    """torch's own attention under the same mask: the yardstick for errors."""
    seen = _seen(q.shape[1], k.shape[1], sparse_stride, sparse_summary)
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    return out.transpose(1, 2).nan_to_num(0.0)


@pytest.mark.parametrize("stride, summary", PATTERNS)
def test_what_is_seen_pair_by_pair(isa: str, stride: int, summary: int) -> None:
    # Equal scores and unit vectors as values: the output shows every key that is seen.
    for queries, keys in size_for(isa, ((200, 200), (90, 200), (200, 90)), ((40, 150), (70, 40))):
        values = torch.eye(keys)[None, :, None]
        q, k = torch.zeros(1, queries, 1, keys), torch.zeros(1, keys, 1, keys)
        expected = _seen(queries, keys, stride, summary)
        out = attention(q, k, values, **_pattern(stride, summary))[0, :, 0]
        assert torch.equal(out != 0, expected)
        exact = attention_reference(q.double(), k.double(), values.double(), **_pattern(stride, summary))[
            0, :, 0
        ]
        assert torch.equal(exact > 0, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride, summary", [(5, 0), (128, 32)])
def test_values_of_hidden_keys_count_nothing(isa: str, dtype: torch.dtype, stride: int, summary: int) -> None:
    # The weight of a hidden key is exactly 0, not merely small: times 2^120 nothing is left of it.
    q, k, v = inputs(1, 90, 300, 2, 1, 40, dtype)
    clean = attention(q, k, v, **_pattern(stride, summary))
    hidden = ~_seen(90, 300, stride, summary)[-3:].any(0)
    assert hidden.any()
    v[:, hidden] = 2.0**120
    assert same_bits(attention(q, k, v, **_pattern(stride, summary))[:, -3:], clean[:, -3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride, summary", [(5, 0), (128, 0), (7, 2), (128, 32)])
def test_matches_float64_at_every_shape_on_every_isa(isa: str, dtype: torch.dtype, stride, summary) -> None:
    for shape in shapes_for(isa, SHAPES):
        check(inputs(1, *shape, dtype), _torch_sparse, **_pattern(stride, summary))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride, summary", [(128, 0), (300, 0), (128, 32), (96, 5)])
def test_long_rows_of_blocks_some_of_them_skipped(isa: str, dtype: torch.dtype, stride, summary) -> None:
    q, k, v = inputs(1, *size_for(isa, (700, 900), (90, 400)), 2, 1, 64, dtype)
    check((q * 3, k, v), _torch_sparse, **_pattern(stride, summary))


def test_a_stride_beyond_the_sequence_is_causal(isa: str) -> None:
    for dtype in DTYPES:
        tensors = inputs(*size_for(isa, (2, 300, 300), (1, 70, 150)), 4, 2, 64, dtype)
        exact = attention(*tensors, causal=True).double()
        for summary in (0, 1):
            got = attention(*tensors, **_pattern(300, summary)).double()
            # The same sums over other blocks.
            assert (got - exact).abs().max().item() <= (2.0**-7 if dtype == torch.bfloat16 else 2.0**-20)


def test_scales_documents_and_dropout(isa: str) -> None:
    for dtype in DTYPES:
        tensors = inputs(1, 150, 150, 2, 1, 40, dtype)
        for scale in (0.0, -0.3):
            check(tensors, None, softmax_scale=scale, **_pattern(32, 4))
        check(tensors, None, dropout_p=0.2, seed=3, **_pattern(40, 0))
        cu = torch.tensor([0, 60, 61, 150], dtype=torch.int32)
        check([x[0] for x in tensors], None, cu_seqlens_q=cu, **_pattern(32, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_run(threads: None, isa: str, dtype: torch.dtype) -> None:
    tensors = inputs(1, *size_for(isa, (700, 700), (70, 400)), 2, 1, 32, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)

    def step() -> list[torch.Tensor]:
        out, gradients = gradients_of(attention, tensors, grad, **_pattern(128, 32))
        return [out, *gradients]

    assert_same_in_every_run(isa, step)


def test_few_rows_numpy_fused_and_gradcheck() -> None:
    check(inputs(2, 3, 150, 4, 4, 40, torch.float32), _torch_sparse, **_pattern(16, 2))
    q, k, v = inputs(2, 9, 9, 2, 1, 8, torch.float32)
    expected = attention(q, k, v, **_pattern(3, 1))
    arrays = attention(*[x.numpy() for x in (q, k, v)], **_pattern(3, 1))
    assert isinstance(arrays, np.ndarray) and same_bits(torch.from_numpy(arrays), expected)
    qkv = torch.cat([q, k, v], 2).flatten(2)
    assert same_bits(attention_qkv(qkv, 2, 1, **_pattern(3, 1)), expected.flatten(2))
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda *a: attention_reference(*a, **_pattern(3, 0)), doubles)


@pytest.mark.parametrize("stride, summary", [(3, 0), (4, 2)])
def test_opcheck_and_compile(stride: int, summary: int) -> None:
    check_ops(inputs(1, 9, 9, 2, 1, 4, torch.float32), **_pattern(stride, summary))
    check_compiled(inputs(2, 12, 12, 2, 1, 16, torch.float32), **_pattern(stride, summary))


ONE = torch.zeros(2, 3, 2, 8)
BAD = [
    ({"sparse_stride": -1, "causal": True}, "'sparse_stride': got -1"),
    ({"sparse_stride": 4}, "'sparse_stride': got attention that is not causal"),
    ({"sparse_stride": 4, "causal": True, "window_size": (2, -1)}, "'sparse_stride': got a window"),
    (
        {"sparse_stride": 4, "sparse_summary": 5, "causal": True},
        "'sparse_summary': got 5, expected 0 to.*, 4",
    ),
    ({"sparse_summary": 1, "causal": True}, "'sparse_summary': got 1, expected 0"),
    (
        {"sparse_stride": 4, "causal": True, "prefix_lengths": torch.zeros(2, dtype=torch.int32)},
        "'sparse_stride': got prefix_lengths",
    ),
]


@pytest.mark.parametrize("options, text", BAD)
def test_bad_input_is_named(options, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attention(ONE, ONE, ONE, **options)
