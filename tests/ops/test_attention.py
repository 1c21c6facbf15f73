from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import ops
from gptcore.ops.attention import (
    attention,
    attention_backward,
    attention_qkv,
    attention_reference,
    option_values,
)
from tests.ops.attention_oracle import (
    DTYPES,
    assert_same_in_every_run,
    check,
    gradients_of,
    inputs,
    shapes_for,
    size_for,
    torch_attention,
)
from tests.tolerance import same_bits

# T, S, H, Hkv, D: single elements, less than a vector, one more than a tile, blocks and their tails, T != S both ways.
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 5, 2, 2, 3),
    (17, 33, 4, 2, 32),
    (33, 17, 2, 1, 65),
    (65, 65, 2, 2, 80),
    (130, 300, 2, 1, 17),
    (300, 130, 3, 1, 64),
    (64, 64, 4, 4, 33),
    (7, 600, 8, 2, 96),
    (260, 260, 1, 1, 128),
    (40, 40, 2, 2, 256),
    (1, 300, 8, 2, 64),  # few rows: the path of decoding
    (2, 150, 3, 3, 81),
]
MASKS = [
    {},
    {"causal": True},
    {"window_size": (20, 3)},
    {"causal": True, "window_size": (40, -1)},
    {"window_size": (0, 0)},
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_shape_and_mask_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for shape in shapes_for(isa, SHAPES):
        for mask in size_for(isa, MASKS, MASKS[1:4]):
            check(inputs(2, *shape, dtype), **mask)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2),
    queries=st.integers(0, 70),
    keys=st.integers(0, 140),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    size=st.integers(1, 70),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 60), st.integers(-1, 60)),
    scale=st.sampled_from([None, 0.3, -0.2, 0.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_option(
    batch, queries, keys, kv_heads, group, size, causal, window, scale, dtype, seed
) -> None:
    torch.manual_seed(seed)
    tensors = inputs(batch, queries, keys, kv_heads * group, kv_heads, size, dtype)
    if batch * queries * keys == 0:
        out, gradients = gradients_of(
            attention, tensors, torch.randn(tensors[0].shape), causal=causal, window_size=window
        )
        assert not out.any() and not any(g.any() for g in gradients)
        return
    check(tensors, causal=causal, window_size=window, softmax_scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_heads_and_a_long_row_of_blocks(isa: str, dtype: torch.dtype) -> None:
    # Longer than every block size, so that rescaling, skipped blocks and sums over blocks all take place.
    q, k, v = inputs(1, *size_for(isa, (700, 900), (150, 190)), 2, 1, 64, dtype)
    check((q * 3, k, v), causal=True, window_size=(q.shape[1] // 2 - 17, -1))
    check((q * 3, k, v), causal=True)


def test_large_scores_are_rescaled_without_overflow(isa: str) -> None:
    # Scores grow with the key, so that the running maximum rises in every block, to several hundreds.
    q, k, v = inputs(1, 33, 800, 1, 1, 32, torch.float32)
    k = k + torch.linspace(0, 30, 800)[None, :, None, None]
    check((q.abs() + 1, k, v), causal=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_do_not_see_each_other(isa: str, dtype: torch.dtype) -> None:
    lengths_q, lengths_k = [5, 0, 130, 1, 64], [9, 4, 130, 0, 20]
    cu_q = torch.tensor([0, *np.cumsum(lengths_q)], dtype=torch.int32)
    cu_k = torch.tensor([0, *np.cumsum(lengths_k)], dtype=torch.int32)
    q, k, v = (torch.randn(n, h, 40).to(dtype) for n, h in ((200, 4), (163, 2), (163, 2)))

    def by_document(q, k, v, causal, **_):
        out = [q[:0]]
        for i in range(5):
            one = [x[None, c[i] : c[i + 1]] for x, c in ((q, cu_q), (k, cu_k), (v, cu_k))]
            out.append(torch_attention(*one, causal=causal)[0] if lengths_k[i] else one[0][0] * 0)
        return torch.cat(out)

    for causal in (False, True):
        check((q, k, v), by_document, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        whole = attention(q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        alone = attention(q[None, 5:135], k[None, 13:143], v[None, 13:143], causal=causal)
        assert same_bits(whole[5:135], alone[0])


def test_queries_that_see_nothing_are_zero_and_get_no_gradient(isa: str) -> None:
    q, k, v = inputs(2, 50, 20, 2, 1, 24, torch.float32)
    out, gradients = gradients_of(attention, (q, k, v), torch.randn(q.shape), causal=True)
    lse = attention(q, k, v, causal=True, return_lse=True)[1]
    assert not out[:, :30].any() and out[:, 30:].all()
    assert lse[..., :30].isneginf().all() and lse[..., 30:].isfinite().all()
    assert not gradients[0][:, :30].any()
    none = attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert not none[0].any() and none[1].isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_fused_projection_are_read_and_written_in_place(isa: str, dtype: torch.dtype) -> None:
    heads, kv_heads, size = 4, 2, 48
    qkv = torch.randn(2, 37, (heads + 2 * kv_heads) * size).to(dtype)
    grad = torch.randn(2, 37, heads * size).to(dtype)
    fused = qkv.clone().requires_grad_()
    out = attention_qkv(fused, heads, kv_heads, causal=True)
    (dqkv,) = torch.autograd.grad(out, fused, grad)
    q, k, v = qkv.view(2, 37, -1, size).split([heads, kv_heads, kv_heads], 2)
    assert not q.is_contiguous()
    split_out, split = gradients_of(attention, (q, k, v), grad.view(2, 37, heads, size), causal=True)
    assert same_bits(out.detach(), split_out.flatten(2))
    assert same_bits(dqkv, torch.cat([g.flatten(2) for g in split], -1))
    contiguous = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert same_bits(contiguous, attention(q, k, v, causal=True))
    cu = torch.tensor([0, 37, 74], dtype=torch.int32)
    packed = attention_qkv(qkv.flatten(0, 1), heads, kv_heads, causal=True, cu_seqlens_q=cu, return_lse=True)
    assert same_bits(packed[0].view_as(out), out.detach())
    assert packed[1].shape == (heads, 74)


def test_strides_of_heads_tokens_and_outputs_are_free() -> None:
    q, k, v = (
        x.transpose(1, 2) for x in inputs(2, 4, 4, 30, 30, 33, torch.float32)
    )  # (B, T, H, D) from heads first
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert same_bits(attention(q, k, v), expected)
    room = torch.full((2, 30, 4, 50), 7.0)
    out = room[..., 1:34]
    assert attention(q, k, v, out=out) is out
    assert same_bits(out, expected) and (room[..., 0] == 7).all() and (room[..., 34:] == 7).all()
    last = inputs(1, 6, 6, 2, 2, 8, torch.float32)[0].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert last.stride(-1) != 1  # copied first
    assert same_bits(attention(last, last, last), attention(*[last.contiguous()] * 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 200, 260, 6, 2, 64), (1, 300, 700, 2, 1, 32)])
def test_same_bits_for_every_thread_count_and_run(threads: None, isa: str, dtype, shape) -> None:
    # The second shape has few heads: backward splits its keys and adds partial dq.
    shape = size_for(isa, shape, (1, 70, 140, 2, 1, 24))
    tensors = inputs(*shape, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)

    def step() -> list[torch.Tensor]:
        out, gradients = gradients_of(attention, tensors, grad, causal=True)
        return [out, *gradients]

    assert_same_in_every_run(isa, step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    tensors = inputs(9, 150, 150, 4, 2, 64, dtype)
    whole = attention(*tensors, causal=True)
    for i in (0, 4, 8):
        assert same_bits(whole[i : i + 1], attention(*[x[i : i + 1] for x in tensors], causal=True))


def test_not_a_number_stays_in_the_rows_that_see_it() -> None:
    for dtype in DTYPES:
        q, k, v = inputs(1, 40, 40, 1, 1, 16, dtype)
        clean = attention(q, k, v, causal=True)
        k[0, 20, 0, 3] = float("nan")
        got = attention(q, k, v, causal=True)
        assert same_bits(got[:, :20], clean[:, :20]) and got[:, 20:].isnan().all()


def test_numpy_arrays_and_explicit_backward() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensors = inputs(2, 20, 30, 4, 2, 24, torch.float32)
    grad = torch.randn(tensors[0].shape)
    arrays = [x.numpy() for x in tensors]
    out, lse = attention(*arrays, causal=True, return_lse=True)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    expected, gradients = gradients_of(attention, tensors, grad, causal=True)
    assert same_bits(torch.from_numpy(out), expected)
    for a, b in zip(attention_backward(grad.numpy(), *arrays, out, lse, causal=True), gradients, strict=True):
        assert same_bits(torch.from_numpy(a), b)
    fused = np.concatenate([x[:, :20].reshape(2, 20, -1) for x in arrays], -1)
    square = attention(arrays[0], arrays[1][:, :20], arrays[2][:, :20])
    assert np.array_equal(attention_qkv(fused, 4, 2), square.reshape(2, 20, -1))
    half = attention(*[x.astype(ml_dtypes.bfloat16) for x in arrays])
    assert half.dtype == ml_dtypes.bfloat16
    twin = attention(*[x.bfloat16() for x in tensors])
    assert np.array_equal(half.view(np.uint16), twin.view(torch.uint16).numpy())


def test_opcheck_and_gradcheck() -> None:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v = (x.requires_grad_() for x in inputs(1, 5, 5, 2, 1, 4, torch.float32))
    options = (*option_values("attention", q, 4, {"softmax_scale": 0.5, "causal": True}), False)
    torch.library.opcheck(torch.ops.gptcore.attention.default, (q, k, v, None, None, *options))
    packed = [x.detach()[0].requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.gptcore.attention.default, (*packed, cu, cu, *options))
    qkv = torch.randn(1, 5, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.gptcore.attention_qkv.default, (qkv, None, 2, 1, *options))
    doubles = [x.detach().double().requires_grad_() for x in (q, k[:, :4], v[:, :4])]
    torch.autograd.gradcheck(
        lambda *a: attention_reference(*a, causal=True, window_size=(2, -1)), doubles
    )  # the first query sees nothing: no lse there to differentiate
    torch.autograd.gradcheck(lambda *a: attention_reference(*a, return_lse=True), doubles)


def test_compiles_into_one_graph() -> None:
    tensors = inputs(2, 12, 12, 2, 1, 16, torch.float32)

    def block(q, k, v):
        out = ops.attention(q, k, v, causal=True)
        qkv = torch.cat([out, k, v], 2).flatten(2)
        return out.flatten(2) * 2 + ops.attention_qkv(qkv, 2, 1, causal=True)

    eager = [t.clone().requires_grad_() for t in tensors]
    compiled = [t.clone().requires_grad_() for t in tensors]
    block(*eager).sum().backward()
    torch.compile(block, fullgraph=True)(*compiled).sum().backward()
    for a, b in zip(eager, compiled, strict=True):
        assert same_bits(a.grad, b.grad)


def test_second_derivatives_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 5, 5, 1, 1, 8, torch.float32))
    (gradient,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def _one(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def _lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _packed(cu: Any, cu_k: Any = None) -> Any:
    return attention(_one(6, 2, 4), _one(6, 2, 4), _one(6, 2, 4), cu_seqlens_q=cu, cu_seqlens_k=cu_k)


Q, KV = (1, 3, 4, 8), (1, 5, 2, 8)
BAD = [
    (
        lambda: attention(*[_one(*Q).double()] * 3),
        TypeError,
        "'q': got float64, expected float32 or bfloat16",
    ),
    (lambda: attention(_one(*Q), _one(*KV).bfloat16(), _one(*KV)), TypeError, "'k': got bfloat16"),
    (lambda: attention(_one(3, 4, 8), _one(*KV), _one(*KV)), ValueError, "'q': got 3 dimensions, expected 4"),
    (lambda: attention(_one(*Q), _one(2, 5, 2, 8), _one(2, 5, 2, 8)), ValueError, "'k': got batch 2"),
    (
        lambda: attention(_one(*Q), _one(1, 5, 3, 8), _one(1, 5, 3, 8)),
        ValueError,
        "3 heads, expected a divisor",
    ),
    (lambda: attention(_one(*Q), _one(*KV), _one(1, 4, 2, 8)), ValueError, "'v'.*the shape of 'k'"),
    (lambda: attention(_one(*Q), _one(1, 5, 2, 9), _one(1, 5, 2, 9)), ValueError, "head size 9, expected.*8"),
    (lambda: attention(*[_one(1, 2, 1, 300)] * 3), ValueError, "head size 300, expected 1 to 256"),
    (lambda: attention(*[_one(1, 2, 1, 0)] * 3), ValueError, "head size 0, expected 1 to 256"),
    (
        lambda: attention(_one(*Q), _one(*KV), _one(*KV), window_size=(-2, 0)),
        ValueError,
        "'window_size'.*\\(-2, 0",
    ),
    (
        lambda: attention(_one(*Q), _one(*KV), _one(*KV), softmax_scale=float("nan")),
        ValueError,
        "'softmax_scale'",
    ),
    (lambda: attention(_one(*Q), _one(*KV), _one(*KV), out=_one(1, 3, 4, 9)), ValueError, "'out': got shape"),
    (
        lambda: attention(_one(*Q), _one(*KV), _one(*KV), out=_one(1, 3, 8, 4).transpose(2, 3)),
        ValueError,
        "'out': got stride 4 in the last dimension, expected stride 1",
    ),
    (lambda: attention(*[_one(1, 2, 1, 4).to("meta")] * 3), TypeError, "meta"),
    (lambda: _packed(_lengths(0, 6).long()), TypeError, "'cu_seqlens_q': got int64, expected int32"),
    (lambda: _packed(_lengths(0, 4)), ValueError, "'cu_seqlens_q': got a last element of 4.*tokens, 6"),
    (lambda: _packed(_lengths(1, 6)), ValueError, "'cu_seqlens_q': got a first element of 1, expected 0"),
    (lambda: _packed(_lengths(0, 5, 3, 6)), ValueError, "got 3 after 5 at position 2.*do not decrease"),
    (lambda: _packed(_lengths(0, 6), _lengths(0, 3, 6)), ValueError, "'cu_seqlens_k': got 2 documents.*, 1"),
    (lambda: _packed(_lengths()), ValueError, "'cu_seqlens_q': got 0 elements"),
    (
        lambda: attention_qkv(_one(1, 3, 30), 2, 1),
        ValueError,
        "attention_qkv: argument 'qkv'.*dimension of 30",
    ),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_read_only_output_is_refused_and_untouched() -> None:
    x = np.ones((1, 2, 1, 4), np.float32)
    out = np.full_like(x, 7.0)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="'out': got a read-only array"):
        attention(x, x, x, out=out)
    assert (out == 7).all()


def test_out_form_refusesgradients_of() -> None:
    q, k, v = inputs(1, 3, 3, 1, 1, 8, torch.float32)
    with pytest.raises(RuntimeError, match="out="):
        attention(q.requires_grad_(), k, v, out=torch.empty(1, 3, 1, 8))


def test_autocast_takes_bf16_as_torch_does() -> None:
    tensors = inputs(1, 9, 9, 2, 2, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(*tensors)
    assert same_bits(got, attention(*[x.bfloat16() for x in tensors]))
