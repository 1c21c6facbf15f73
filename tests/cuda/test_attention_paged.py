"""Attention over pages on a GPU, in a graph: what was captured once serves a cache as it grows."""

from __future__ import annotations

import pytest
import torch

from gptcore.ops.attention_paged import attention_paged
from tests.tolerance import same_bits


@pytest.mark.cuda
def test_a_captured_step_serves_a_cache_as_it_grows() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    k, v = (torch.randn(600, 16, 2, 128, device="cuda").bfloat16() for _ in range(2))
    table = torch.randperm(600, device="cuda").int().view(2, 300)
    q = torch.randn(2, 1, 8, 128, device="cuda").bfloat16()
    lengths = torch.tensor([1, 17], dtype=torch.int32, device="cuda")
    attention_paged(q, k, v, table, lengths, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_paged(q, k, v, table, lengths, causal=True)
    for grown in ([1, 17], [255, 256], [257, 0], [4800, 4799]):
        lengths.copy_(torch.tensor(grown))
        graph.replay()
        used = -(-max(grown) // 16)
        assert same_bits(out, attention_paged(q, k, v, table[:, :used].contiguous(), lengths, causal=True))
