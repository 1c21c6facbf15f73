"""Decoding: one to four rows a key head, over every option that may come with it and sizes around its blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend
from gptcore.ops.attention import attention
from tests.ops.attention_oracle import check, inputs
from tests.tolerance import assert_same_for_threads, same_bits

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 40, 64, 128, 256])
def test_matches_float64_around_every_block_on_every_isa(isa: str, dtype: torch.dtype, size: int) -> None:
    every = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 130, 200)
    for keys in (1, 17, 65) if isa == "simt" else every:
        check(inputs(2, 1, keys, 4, 2, size, dtype), causal=True)


@settings(max_examples=80, deadline=None)
@given(
    queries=st.integers(1, 4), group=st.integers(1, 4), keys=st.integers(1, 200),
    size=st.sampled_from([32, 64, 96, 256]), dtype=st.sampled_from(DTYPES), causal=st.booleans(),
    window=st.sampled_from([(-1, -1), (20, 0), (70, 3)]), scale=st.sampled_from([None, -0.2, 0.0]),
    cap=st.sampled_from([None, 3.0]), alibi=st.booleans(), sinks=st.booleans(), mask=st.booleans(),
    bias=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_option(
    queries, group, keys, size, dtype, window, causal, scale, cap, alibi, sinks, mask, bias, seed
) -> None:
    torch.manual_seed(seed)
    group = min(group, 4 // queries)
    heads = 2 * group
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": window,
        "softmax_scale": scale,
        "soft_cap": cap,
    }
    if alibi:
        options["alibi_slopes"] = torch.rand(heads) * 0.3
    if sinks:
        options["sinks"] = torch.randn(heads)
    if mask:
        options["attn_mask"] = torch.rand(1, 1, queries, keys) < 0.7
    if bias:
        options["attn_bias"] = torch.randn(1, heads, queries, keys)
    check(inputs(2, queries, keys, heads, 2, size, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_has_the_same_bits_in_any_batch_and_on_any_thread_count(
    isa: str, threads: None, dtype: torch.dtype
) -> None:
    q, k, v = inputs(5, 1, 150, 8, 2, 64, dtype)
    assert_same_for_threads(lambda: [attention(q, k, v, causal=True)])
    whole = attention(q, k, v, causal=True)
    for i in range(5):
        assert same_bits(attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], causal=True), whole[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_behind_the_keys_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    """As in a cache with room: rows beyond those of the view, and a neighbouring head's, may hold anything."""
    q, k, v = inputs(2, 1, 70, 4, 2, 64, dtype)
    roomy = [torch.full((2, 160, 3, 64), float("nan"), dtype=dtype) for _ in range(2)]
    for room, x in zip(roomy, (k, v), strict=True):
        room[:, :70, :2] = x
    got = attention(q, *(room[:, :70, :2] for room in roomy), causal=True)
    assert same_bits(got, attention(q, k, v, causal=True))


def test_tiles_take_bf16_where_the_processor_has_them() -> None:
    """Heads of whole tiles go another way than others: their probabilities are rounded to bf16."""
    if "amx" not in backend.available_isas():
        pytest.skip("this processor has no AMX")
    q, k, v = inputs(1, 1, 90, 2, 2, 64, torch.bfloat16)
    before, found = backend.isa(), {}
    try:
        for isa in ("v4", "amx"):
            backend.set_isa(isa)
            found[isa] = attention(q, k, v).double()
    finally:
        backend.set_isa(before)
    difference = (found["v4"] - found["amx"]).abs().max()
    assert 0 < difference < 4 * torch.finfo(torch.bfloat16).eps
