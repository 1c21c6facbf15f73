from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gptcore.functional as F
from gptcore import backend, ops
from gptcore.ops.attention import attention, attention_backward, attention_qkv, attention_reference
from gptcore.ops.attention_dropout import dropout_factors
from tests.ops.attention_oracle import (
    DTYPES,
    assert_same_in_every_run,
    check,
    gradients_of,
    inputs,
    shapes_for,
    size_for,
    torch_dropout,
)
from tests.ops.test_attention import SHAPES
from tests.tolerance import same_bits

OPTIONS = [
    {"dropout_p": 0.1, "seed": 1},
    {"dropout_p": 0.5, "seed": -1, "offset": 2**32 - 1, "causal": True},
    {"dropout_p": 0.3, "seed": 2**63 + 12345, "offset": 3, "window_size": (20, 3)},
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_shape_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for shape in shapes_for(isa, SHAPES):
        for options in size_for(isa, OPTIONS, OPTIONS[1:]):
            check(inputs(2, *shape, dtype), torch_dropout, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_beyond_the_first_drop_by_their_own_place(isa: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(1, *size_for(isa, (700, 900), (150, 190)), 2, 1, 64, dtype)
    window = (q.shape[1] // 2 - 17, -1)
    check((q * 3, k, v), torch_dropout, causal=True, window_size=window, dropout_p=0.2, seed=5)
    check((q, k, v), torch_dropout, causal=True, dropout_p=0.2, seed=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3])
def test_exactly_what_the_rule_says_is_dropped_both_ways(isa: str, dtype: torch.dtype, group: int) -> None:
    # Equal scores: every weight is 1 / S. With unit vectors as values the output shows each weight kept, with unit
    # vectors as gradients that of the values does.
    size, heads, p, seed, offset = size_for(isa, 200, 70), 2 * group, 0.25, 2**40 + 9, 77
    zero = torch.zeros(2, size, heads, size).to(dtype)
    key = torch.zeros(2, size, 2, size).to(dtype)
    unit = torch.eye(size).to(dtype)
    kept = dropout_factors((2, heads, size, size), p, seed, offset) > 0
    for keywords in ({}, {"causal": True}):
        options = {"dropout_p": p, "seed": seed, "offset": offset, **keywords}
        values = unit[None, :, None].expand(2, size, 2, size)
        out = attention(zero, key, values, **options).transpose(1, 2)
        seen = kept.tril() if keywords else kept
        assert torch.equal(out > 0, seen)
        grad = unit[None, :, None].expand(2, size, heads, size)
        _, (_, _, dv) = gradients_of(attention, (zero, key, values), grad, **options)
        # dv[b, s, k, t] sums over the heads of a group.
        assert torch.equal(dv.permute(0, 2, 3, 1) > 0, seen.unflatten(1, (2, group)).any(2))
        if not keywords and dtype == torch.float32:
            scale = 65536 / round((1 - p) * 65536) / size
            assert (out[seen] - scale).abs().max().item() < 4 * 2**-24 * scale


def test_the_share_that_is_kept() -> None:
    for p in (0.1, 0.5, 0.9):
        kept = dropout_factors((2, 4, 512, 512), p, 11) > 0
        share = kept.double().mean().item()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5 + 2**-17
        # Neighbours in any direction are kept independently.
        both = (1 - p) ** 2
        for a, b in (
            (kept[..., 1:], kept[..., :-1]),
            (kept[:, :, 1:], kept[:, :, :-1]),
            (kept[:, 1:], kept[:, :-1]),
        ):
            assert abs((a & b).double().mean().item() - both) < 5 * (both / a.numel()) ** 0.5 + 2**-16


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_is_that_of_the_softmax_before_dropout(isa: str, dtype: torch.dtype) -> None:
    tensors = inputs(2, *size_for(isa, (130, 300), (70, 90)), 4, 2, 64, dtype)
    plain = attention(*tensors, causal=True, return_lse=True)
    dropped = attention(*tensors, causal=True, return_lse=True, dropout_p=0.4, seed=1)
    assert not torch.equal(plain[0], dropped[0])
    if isa == "simt":  # CUDA's kernels with options sum over other tiles
        assert (plain[1] - dropped[1]).abs().max() < 2e-6
    else:
        assert same_bits(plain[1], dropped[1])


def test_limits_of_the_probability(isa: str) -> None:
    tensors = inputs(2, 40, 40, 2, 1, 24, torch.float32)
    grad = torch.randn(tensors[0].shape)
    plain = gradients_of(attention, tensors, grad)
    nothing = gradients_of(attention, tensors, grad, dropout_p=2.0**-18, seed=1)  # rounds to 0
    assert same_bits(plain[0], nothing[0])
    assert all(same_bits(a, b) for a, b in zip(plain[1], nothing[1], strict=True))
    out, gradients = gradients_of(attention, tensors, grad, dropout_p=1.0, seed=1)
    assert not out.any() and not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_count_from_their_own_beginnings(isa: str, dtype: torch.dtype) -> None:
    lengths_q, lengths_k = [5, 0, 130, 1, 64], [9, 4, 130, 0, 20]
    cu_q = torch.tensor([0, *np.cumsum(lengths_q)], dtype=torch.int32)
    cu_k = torch.tensor([0, *np.cumsum(lengths_k)], dtype=torch.int32)
    q, k, v = (torch.randn(n, h, 40).to(dtype) for n, h in ((200, 4), (163, 2), (163, 2)))
    options = {"causal": True, "dropout_p": 0.3, "seed": 8}

    def by_document(q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> Any:
        out = [q[:0]]
        for i in range(5):
            one = [x[None, c[i] : c[i + 1]] for x, c in ((q, cu_q), (k, cu_k), (v, cu_k))]
            out.append(torch_dropout(*one, first=i, **options)[0] if lengths_k[i] else one[0][0] * 0)
        return torch.cat(out)

    check((q, k, v), by_document, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    packed = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    # The same document as third sequence of a batch.
    padded = [torch.zeros(3, 130, *x.shape[1:]).to(dtype) for x in (q, k, v)]
    for x, place, begin in zip((q, k, v), padded, (5, 13, 13), strict=True):
        place[2] = x[begin : begin + 130]
    assert same_bits(packed[5:135], attention(*padded, **options)[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 200, 260, 6, 2, 64), (1, 300, 700, 2, 1, 32)])
def test_same_bits_for_every_thread_count_and_run(threads: None, isa: str, dtype, shape) -> None:
    shape = size_for(isa, shape, (1, 70, 140, 2, 1, 24))
    tensors = inputs(*shape, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)

    def step() -> list[torch.Tensor]:
        out, gradients = gradients_of(attention, tensors, grad, causal=True, dropout_p=0.1, seed=2)
        return [out, *gradients]

    assert_same_in_every_run(isa, step)


def test_seeds_offsets_and_frameworks() -> None:
    tensors = inputs(2, 20, 30, 4, 2, 24, torch.float32)
    options = {"causal": True, "dropout_p": 0.3}
    expected, gradients = gradients_of(attention, tensors, tensors[0], **options, seed=-5)
    for seed in (2**64 - 5, torch.tensor([-5]), torch.tensor(-5)):
        assert same_bits(attention(*tensors, **options, seed=seed), expected)
    for other in ({"seed": -6}, {"seed": -5 + 2**32}, {"seed": -5, "offset": 1}):
        assert not torch.equal(attention(*tensors, **options, **other), expected)
    arrays = [x.numpy() for x in tensors]
    for seed in (-5, np.array([-5])):
        out, lse = attention(*arrays, **options, seed=seed, return_lse=True)
        assert isinstance(out, np.ndarray) and same_bits(torch.from_numpy(out), expected)
    back = attention_backward(arrays[0], *arrays, out, lse, **options, seed=-5)
    assert all(same_bits(torch.from_numpy(a), b) for a, b in zip(back, gradients, strict=True))


def test_a_fused_projection_drops_the_same() -> None:
    heads, kv_heads, size = 4, 2, 48
    qkv = torch.randn(2, 37, (heads + 2 * kv_heads) * size, requires_grad=True)
    q, k, v = qkv.detach().view(2, 37, -1, size).split([heads, kv_heads, kv_heads], 2)
    grad = torch.randn(2, 37, heads * size)
    options = {"causal": True, "dropout_p": 0.2, "seed": 4}
    out = attention_qkv(qkv, heads, kv_heads, **options)
    split_out, split = gradients_of(attention, (q, k, v), grad.view(2, 37, heads, size), **options)
    assert same_bits(out.detach(), split_out.flatten(2))
    (dqkv,) = torch.autograd.grad(out, qkv, grad)
    assert same_bits(dqkv, torch.cat([g.flatten(2) for g in split], -1))


def test_opcheck_gradcheck_and_compile() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 5, 5, 2, 1, 4, torch.float32)]
    options = dict.fromkeys(["causal"], True) | {"dropout_p": 0.5, "seed": torch.tensor([3])}
    torch.autograd.gradcheck(
        lambda *a: attention_reference(*a, **options), [x.detach().double().requires_grad_() for x in tensors]
    )

    def block(q, k, v, seed):
        return ops.attention(q, k, v, causal=True, dropout_p=0.5, seed=seed) * 2

    eager = [t.detach().clone().requires_grad_() for t in tensors]
    compiled = [t.detach().clone().requires_grad_() for t in tensors]
    block(*eager, torch.tensor([3])).sum().backward()
    torch.compile(block, fullgraph=True)(*compiled, torch.tensor([3])).sum().backward()
    for a, b in zip(eager, compiled, strict=True):
        assert same_bits(a.grad, b.grad)


def test_functional_takes_its_seed_from_torchs_generator() -> None:
    backend.reset_report()
    q, k, v = (torch.randn(2, 3, 33, 16, requires_grad=True) for _ in range(3))

    def call() -> list[torch.Tensor]:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    again = call()
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    named = attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, dropout_p=0.4, seed=seed)
    assert same_bits(first[0], named.detach().transpose(1, 2))
    torch.compile(F.scaled_dot_product_attention, fullgraph=True)(q, k, v, dropout_p=0.4)
    assert backend.report() == {}


ONE = torch.zeros(1, 3, 2, 8)
BAD = [
    ({"dropout_p": 0.5}, TypeError, "'seed'"),
    ({"dropout_p": 1.5, "seed": 0}, ValueError, "'dropout_p': got 1.5.*, expected 0 to 1"),
    ({"dropout_p": float("nan"), "seed": 0}, ValueError, "'dropout_p': got nan"),
    ({"dropout_p": 0.5, "seed": 2**64}, ValueError, "'seed': got 18446744073709551616"),
    ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, "'seed': got 2 elements, expected one"),
    ({"dropout_p": 0.5, "seed": torch.tensor([1.0])}, TypeError, "'seed': got float32, expected int64"),
    ({"dropout_p": 0.5, "seed": 1, "offset": 2**32}, ValueError, "'offset': got 4294967296"),
    ({"dropout_p": 0.5, "seed": 1, "offset": -1}, ValueError, "'offset': got -1"),
]


@pytest.mark.parametrize("options, error, text", BAD)
def test_bad_input_is_named(options, error, text: str) -> None:
    with pytest.raises(error, match=text):
        attention(ONE, ONE, ONE, **options)
