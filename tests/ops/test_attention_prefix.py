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
    torch_dropout,
)
from tests.ops.test_attention import SHAPES
from tests.tolerance import same_bits


def _lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _torch_prefix(
    q: Any, k: Any, v: Any, *, prefix_lengths: torch.Tensor, causal: bool, **keywords: Any
) -> Any:
    """torch's own attention under the same mask: the yardstick for errors."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    key = torch.arange(keys)
    seen = (key <= torch.arange(queries)[:, None] + keys - queries) | (
        key < prefix_lengths[:, None, None, None]
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    return out.transpose(1, 2).nan_to_num(0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_shape_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for shape in shapes_for(isa, SHAPES):
        keys = shape[1]
        prefixes = _lengths(0, 1, keys // 3, keys)
        check(inputs(4, *shape, dtype), _torch_prefix, causal=True, prefix_lengths=prefixes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefixes_that_end_within_and_between_blocks(isa: str, dtype: torch.dtype) -> None:
    sizes, prefixes = size_for(
        isa, ((700, 900), (31, 128, 511, 513, 850)), ((80, 150), (31, 64, 65, 128, 140))
    )
    tensors = inputs(5, *sizes, 2, 1, 64, dtype)
    check(tensors, _torch_prefix, causal=True, prefix_lengths=_lengths(*prefixes))


def test_no_prefix_and_a_whole_one_are_causal_and_full(isa: str) -> None:
    size = size_for(isa, 130, 70)
    tensors = inputs(2, size, size, 4, 2, 64, torch.float32)
    grad = torch.randn(tensors[0].shape)
    for length, causal in ((0, True), (size, False)):
        mine = gradients_of(attention, tensors, grad, causal=True, prefix_lengths=_lengths(length, length))
        plain = gradients_of(attention, tensors, grad, causal=causal)
        assert same_bits(mine[0], plain[0])
        assert all(same_bits(a, b) for a, b in zip(mine[1], plain[1], strict=True))


def test_each_sequence_and_document_has_its_own_prefix(isa: str) -> None:
    prefixes = _lengths(3, 0, 40, 7)
    q, k, v = inputs(4, 40, 40, 2, 1, 32, torch.bfloat16)
    whole = attention(q, k, v, causal=True, prefix_lengths=prefixes)
    for i in range(4):
        alone = attention(
            q[i : i + 1], k[i : i + 1], v[i : i + 1], causal=True, prefix_lengths=prefixes[i : i + 1]
        )
        assert same_bits(whole[i : i + 1], alone)
    cu = _lengths(0, 40, 80, 120, 160)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    options = {"causal": True, "prefix_lengths": prefixes, "cu_seqlens_q": cu}
    assert same_bits(attention(*packed, **options).view_as(whole), whole)
    exact = attention_reference(*[x.double() for x in packed], **options)
    dense = attention_reference(*[x.double() for x in (q, k, v)], causal=True, prefix_lengths=prefixes)
    assert torch.equal(exact.view_as(dense), dense)


def test_with_dropout(isa: str) -> None:
    for dtype in DTYPES:
        options = {"prefix_lengths": _lengths(5, 90), "dropout_p": 0.2, "seed": 1}
        tensors = inputs(2, *size_for(isa, (150, 150), (70, 100)), 4, 2, 40, dtype)
        check(tensors, torch_dropout, causal=True, **options)


def test_decoding_sees_the_prefix(isa: str) -> None:
    for dtype in DTYPES:
        check(
            inputs(2, 2, 150, 4, 4, 40, dtype), _torch_prefix, causal=True, prefix_lengths=_lengths(150, 149)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_run(threads: None, isa: str, dtype: torch.dtype) -> None:
    tensors = inputs(1, *size_for(isa, (300, 700), (70, 140)), 2, 1, 32, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)

    prefixes = _lengths(size_for(isa, 600, 100))

    def step() -> list[torch.Tensor]:
        out, gradients = gradients_of(attention, tensors, grad, causal=True, prefix_lengths=prefixes)
        return [out, *gradients]

    assert_same_in_every_run(isa, step)


def test_numpy_fused_gradcheck_opcheck_and_compile() -> None:
    prefixes = _lengths(2, 4)
    q, k, v = inputs(2, 5, 5, 2, 1, 8, torch.float32)
    expected = attention(q, k, v, causal=True, prefix_lengths=prefixes)
    arrays = attention(*[x.numpy() for x in (q, k, v)], causal=True, prefix_lengths=prefixes.numpy())
    assert isinstance(arrays, np.ndarray) and same_bits(torch.from_numpy(arrays), expected)
    qkv = torch.cat([q, k, v], 2).flatten(2)
    fused = attention_qkv(qkv, 2, 1, causal=True, prefix_lengths=prefixes)
    assert same_bits(fused, expected.flatten(2))
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(
        lambda *a: attention_reference(*a, causal=True, prefix_lengths=prefixes), doubles
    )
    check_ops((q, k, v), causal=True, prefix_lengths=prefixes)
    check_compiled((q, k, v), causal=True, prefix_lengths=prefixes)


ONE = torch.zeros(2, 3, 2, 8)
BAD = [
    ({"prefix_lengths": _lengths(1, 2)}, ValueError, "attention that is not causal, expected causal"),
    (
        {"prefix_lengths": _lengths(1, 2), "causal": True, "window_size": (4, -1)},
        ValueError,
        "'prefix_lengths': got a window bounded to the left",
    ),
    ({"prefix_lengths": _lengths(1), "causal": True}, ValueError, "'prefix_lengths': got shape"),
    (
        {"prefix_lengths": _lengths(1, 4), "causal": True},
        ValueError,
        "got 4 at position 1, expected 0 to.*, 3",
    ),
    ({"prefix_lengths": _lengths(-1, 2), "causal": True}, ValueError, "got -1 at position 0"),
    ({"prefix_lengths": _lengths(1, 2).long(), "causal": True}, TypeError, "got int64, expected int32"),
]


@pytest.mark.parametrize("options, error, text", BAD)
def test_bad_input_is_named(options, error, text: str) -> None:
    with pytest.raises(error, match=text):
        attention(ONE, ONE, ONE, **options)
