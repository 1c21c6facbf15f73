"""What attention may do to its scores before the softmax: soft cap, ALiBi, mask, bias and sinks."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend
from gptcore.ops.attention import attention, attention_backward, attention_qkv, attention_reference
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
    torch_attention,
)
from tests.tolerance import ROUNDOFF, assert_close_to_exact, assert_same_for_threads, same_bits

# T, S, H, Hkv, D; the last are the path of decoding.
SHAPES = [
    (3, 5, 2, 2, 3),
    (65, 65, 2, 2, 80),
    (130, 300, 4, 2, 17),
    (300, 130, 3, 1, 64),
    (1, 300, 8, 2, 64),
    (2, 150, 3, 3, 33),
]
MASKS = [{}, {"causal": True}, {"window_size": (20, 3)}]


def _slopes(heads: int, batch: int | None = None) -> torch.Tensor:
    return torch.rand(heads if batch is None else (batch, heads)) * 0.6


def _mask(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) > 0.4


def _modifiers(batch: int, heads: int, queries: int, keys: int) -> list[dict[str, Any]]:
    return [
        {"soft_cap": 30.0},
        {"soft_cap": 0.8},
        {"alibi_slopes": _slopes(heads)},
        {"soft_cap": 2.0, "alibi_slopes": _slopes(heads, batch)},
        {"attn_mask": _mask(batch, 1, queries, keys)},
        {"attn_mask": _mask(keys)[None], "attn_bias": torch.randn(heads, queries, keys)},
        {"soft_cap": 2.0, "attn_bias": torch.randn(batch, 1, 1, keys).bfloat16().float()},
        {"sinks": torch.randn(heads)},
        {"sinks": torch.randn(heads) * 8, "alibi_slopes": _slopes(heads)},
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    shapes = shapes_for(isa, SHAPES)
    for shape in size_for(isa, shapes, shapes[::2]):
        for mask in size_for(isa, MASKS, MASKS[1:2]):
            for modifier in _modifiers(2, shape[2], *shape[:2]):
                check(inputs(2, *shape, dtype), **mask, **modifier)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 70),
    keys=st.integers(1, 140),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    size=st.integers(1, 70),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 60), st.integers(-1, 60)),
    scale=st.sampled_from([None, 0.3, -0.2, 0.0]),
    cap=st.sampled_from([None, 0.1, 3.0, 100.0]),
    alibi=st.sampled_from([None, (), (2,)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_option(
    queries, keys, kv_heads, group, size, causal, window, scale, cap, alibi, dtype, seed
) -> None:
    torch.manual_seed(seed)
    heads = kv_heads * group
    slopes = None if alibi is None else torch.randn(*alibi, heads)
    check(
        inputs(2, queries, keys, heads, kv_heads, size, dtype), causal=causal, window_size=window,
        softmax_scale=scale, soft_cap=cap, alibi_slopes=slopes,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [3.0, -3.0])
def test_the_running_maximum_follows_the_slopes(isa: str, dtype: torch.dtype, slope: float) -> None:
    # Over 800 keys the bias changes by 2400: the sums of earlier blocks vanish, or all later ones do. Backward forms
    # P = exp(S - lse), a difference of two numbers of that size M, each in one f32, so P is off by their roundings. In
    # units of u M, u = 2^-24: slope * distance and its subtraction round S by 2 forward and 2 backward (1 and 1 where
    # they are fused); the slope in powers of two is off by 1.22, its own rounding and log2(e)'s; lse takes 1.03 to
    # become natural again (a product, ln 2's rounding), 1 for adding the logarithm of the sum, and 1.22 to become
    # powers of two in backward. That is 8.5; torch's softmax needs no lse, for it keeps the maximum apart.
    keys = size_for(isa, 800, 200)
    drift = 8.5 * ROUNDOFF[torch.float32] * abs(slope) * keys
    slopes = torch.full((2,), slope)
    check(inputs(1, 33, keys, 2, 1, 32, dtype), drift=drift, alibi_slopes=slopes)
    check(inputs(1, 2, keys, 2, 2, 32, dtype), drift=drift, alibi_slopes=slopes)


def test_scores_beyond_the_cap_stay_finite(isa: str) -> None:
    q, k, v = inputs(1, 40, 40, 2, 2, 16, torch.float32)
    out, gradients = gradients_of(attention, (q * 1e4, k * 1e4, v), torch.randn(q.shape), soft_cap=5.0)
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
    check((q * 30, k, v), soft_cap=5.0)


def test_a_cap_far_away_and_slopes_of_zero_change_nothing_but_roundings() -> None:
    tensors = inputs(1, 70, 70, 2, 2, 32, torch.float32)
    plain = attention(*tensors, causal=True)
    for options in ({"soft_cap": 1e5}, {"alibi_slopes": torch.zeros(2)}):
        assert (attention(*tensors, causal=True, **options) - plain).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_have_places_and_slopes_of_their_own(isa: str, dtype: torch.dtype) -> None:
    lengths = [5, 0, 130, 1, 64]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = (torch.randn(200, h, 40).to(dtype) for h in (4, 2, 2))
    slopes = _slopes(4, 5)

    def by_document(q, k, v, **options):
        out = [q[:0]]
        for i in range(5):
            one = [x[None, cu[i] : cu[i + 1]] for x in (q, k, v)]
            modifiers = {"causal": options["causal"], "alibi_slopes": slopes[i], "soft_cap": 4.0}
            out.append(torch_attention(*one, **modifiers)[0] if lengths[i] else one[0][0])
        return torch.cat(out)

    for causal in (False, True):
        check(
            (q, k, v), by_document, causal=causal, cu_seqlens_q=cu, cu_seqlens_k=cu, soft_cap=4.0,
            alibi_slopes=slopes,
        )  # fmt: skip
        options = {"causal": causal, "soft_cap": 4.0}
        whole = attention(q, k, v, cu_seqlens_q=cu, alibi_slopes=slopes, **options)
        alone = attention(*[x[None, 5:135] for x in (q, k, v)], alibi_slopes=slopes[2], **options)
        assert same_bits(whole[5:135], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 200, 260, 6, 2, 64), (1, 300, 700, 2, 1, 32)])
def test_same_bits_for_every_thread_count_and_run(threads: None, isa: str, dtype, shape) -> None:
    shape = size_for(isa, shape, (1, 70, 140, 2, 1, 24))
    tensors = inputs(*shape, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    options = {"causal": True, "soft_cap": 1.0, "alibi_slopes": _slopes(shape[3])}

    def step() -> list[torch.Tensor]:
        out, gradients = gradients_of(attention, tensors, grad, **options)
        return [out, *gradients]

    assert_same_in_every_run(isa, step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fused_projection_takes_the_same_options(dtype: torch.dtype) -> None:
    heads, kv_heads, size = 4, 2, 48
    qkv = torch.randn(2, 37, (heads + 2 * kv_heads) * size).to(dtype)
    grad = torch.randn(2, 37, heads * size).to(dtype)
    options = {"causal": True, "soft_cap": 1.5, "alibi_slopes": _slopes(heads)}
    fused = qkv.clone().requires_grad_()
    out = attention_qkv(fused, heads, kv_heads, **options)
    (dqkv,) = torch.autograd.grad(out, fused, grad)
    parts = qkv.view(2, 37, -1, size).split([heads, kv_heads, kv_heads], 2)
    split_out, split = gradients_of(attention, parts, grad.view(2, 37, heads, size), **options)
    assert same_bits(out.detach(), split_out.flatten(2))
    assert same_bits(dqkv, torch.cat([g.flatten(2) for g in split], -1))


def test_numpy_arrays_and_explicit_backward() -> None:
    tensors = inputs(2, 20, 30, 4, 2, 24, torch.float32)
    grad = torch.randn(tensors[0].shape)
    arrays, slopes = [x.numpy() for x in tensors], _slopes(4)
    options = {"causal": True, "soft_cap": 1.5}
    out, lse = attention(*arrays, alibi_slopes=slopes.numpy(), return_lse=True, **options)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    expected, gradients = gradients_of(attention, tensors, grad, alibi_slopes=slopes, **options)
    assert same_bits(torch.from_numpy(out), expected)
    got = attention_backward(grad.numpy(), *arrays, out, lse, alibi_slopes=slopes.numpy(), **options)
    for a, b in zip(got, gradients, strict=True):
        assert same_bits(torch.from_numpy(a), b)


def test_opcheck_and_gradcheck() -> None:
    tensors = inputs(1, 5, 5, 2, 1, 4, torch.float32)
    bias, sinks = (torch.randn(n, requires_grad=True) for n in ((2, 5, 5), (2,)))
    check_ops(
        tensors, softmax_scale=0.5, causal=True, soft_cap=2.0, alibi_slopes=_slopes(2), attn_mask=_mask(5, 5),
        attn_bias=bias, sinks=sinks,
    )  # fmt: skip
    doubles = [x.double().requires_grad_() for x in tensors]
    slopes = _slopes(2).double()
    torch.autograd.gradcheck(
        lambda *a: attention_reference(*a, causal=True, soft_cap=0.7, alibi_slopes=slopes), doubles
    )


def test_compiles_into_one_graph() -> None:
    tensors = inputs(2, 12, 12, 2, 1, 16, torch.float32)
    check_compiled(tensors, causal=True, soft_cap=2.0, alibi_slopes=_slopes(2))


def test_autocast_leaves_slopes_alone() -> None:
    backend.reset_report()
    tensors, slopes = inputs(1, 9, 9, 2, 2, 16, torch.float32), _slopes(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(*tensors, alibi_slopes=slopes)
    assert same_bits(got, attention(*[x.bfloat16() for x in tensors], alibi_slopes=slopes))
    assert backend.report() == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(130, 150, 4, 2, 40), (2, 90, 3, 3, 64), (70, 300, 2, 1, 32)])
def test_the_gradient_of_a_bias_is_summed_over_what_was_broadcast(
    isa: str, dtype: torch.dtype, shape
) -> None:
    shape = size_for(isa, shape, (max(shape[0] // 4, 2), shape[1] // 4, *shape[2:]))
    batch, (queries, keys, heads, _, _) = 3, shape
    tensors = inputs(batch, *shape, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    options = {"causal": True, "soft_cap": 3.0, "attn_mask": _mask(batch, 1, queries, keys)}
    for lead in ((), (heads,), (1, heads), (batch, 1), (batch, heads)):
        for kind in dict.fromkeys((torch.float32, dtype)):
            bias = torch.randn(*lead, queries, keys).to(kind)

            def gradient(function, bias, double):
                leaf = (bias.double() if double else bias.clone()).requires_grad_()
                q, k, v = (x.double() if double else x for x in tensors)
                out = function(q, k, v, attn_bias=leaf, **options)
                return torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]

            exact = gradient(attention_reference, bias, True)
            twin = gradient(torch_attention, bias, False)
            got = gradient(attention, bias, False)
            assert got.dtype == kind
            terms = batch * heads * shape[-1]
            # bf16: P comes from the short polynomial (1e-4), and the twin's softmax is f32's
            summand = grad.double().norm(dim=-1).max().item() * tensors[2].double().norm(dim=-1).max().item()
            rounding = 1.0e-4 * 2**24 / terms**0.5 if dtype == torch.bfloat16 else 1.0
            assert_close_to_exact(got, exact, twin, terms=terms, summand=summand * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_bias_has_the_same_bits_for_every_thread_count(
    threads: None, isa: str, dtype
) -> None:
    queries, keys = size_for(isa, (200, 260), (20, 70))
    tensors = inputs(3, queries, keys, 6, 2, 64, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)

    def step() -> list[torch.Tensor]:
        results = []
        for lead in ((), (6,), (3, 1), (3, 6)):
            torch.manual_seed(0)
            leaves = [x.clone().requires_grad_() for x in (*tensors, torch.randn(*lead, queries, keys))]
            out = attention(*leaves[:3], causal=True, attn_bias=leaves[3])
            results += [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        return results

    assert_same_in_every_run(isa, step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_a_mask_empties_are_zero_and_get_no_gradient(isa: str, dtype: torch.dtype) -> None:
    for queries in (50, 2):
        tensors = inputs(2, queries, 40, 2, 1, 24, dtype)
        mask = _mask(queries, 40)
        mask[1] = False
        bias = torch.zeros(queries, 40).masked_fill(~mask, float("-inf"))
        for options in ({"attn_mask": mask}, {"attn_bias": bias}):
            out, gradients = gradients_of(attention, tensors, torch.randn(tensors[0].shape), **options)
            lse = attention(*tensors, return_lse=True, **options)[1]
            assert not out[:, 1].any() and lse[..., 1].isneginf().all() and lse[..., 0].isfinite().all()
            assert not gradients[0][:, 1].any() and all(g.isfinite().all() for g in gradients)
    empty = attention(*tensors, attn_mask=torch.zeros(2, 40, dtype=torch.bool), return_lse=True)
    assert not empty[0].any() and empty[1].isneginf().all()


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v = inputs(1, 40, 40, 1, 1, 16, torch.float32)
    mask = torch.ones(40, dtype=torch.bool)
    mask[7] = False
    clean = attention(q, k, v, attn_mask=mask[None])
    k[:, 7] = float("nan")
    assert same_bits(attention(q, k, v, attn_mask=mask[None]), clean)


def _with_sink_column(q, k, v, *, causal: bool = False, sinks: torch.Tensor | None = None) -> Any:
    """``(out, lse)`` in plain torch: softmax and logsumexp over the scores with the sinks as one more column, whose
    value is 0. Written without attention_reference."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    heads = [(q[:, :, h], k[:, :, h // group], v[:, :, h // group]) for h in range(q.shape[2])]
    outs, lses = [], []
    for h, (q_head, k_head, v_head) in enumerate(heads):
        scores = torch.matmul(q_head, k_head.mT) / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            scores = scores.masked_fill(later, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[h].expand(*scores.shape[:2], 1)], -1)
            v_head = torch.cat([v_head, torch.zeros_like(v_head[:, :1])], 1)
        # Rows that see nothing are NaN in torch; here they count nothing.
        outs.append(torch.matmul(scores.softmax(-1).masked_fill(scores.isneginf().all(-1, True), 0), v_head))
        lses.append(torch.logsumexp(scores, -1))
    return torch.stack(outs, 2), torch.stack(lses, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(130, 150, 4, 2, 40), (2, 90, 3, 3, 64), (300, 130, 6, 2, 32)])
def test_gradients_of_lse_and_sinks(isa: str, dtype: torch.dtype, shape) -> None:
    shape = size_for(isa, shape, (70, 50, 4, 2, 40))
    tensors, sinks = inputs(2, *shape, dtype), torch.randn(shape[2])
    grad = torch.randn(tensors[0].shape).to(dtype)
    grad_lse = torch.randn(2, shape[2], shape[0])
    for options in ({}, {"causal": True}, {"causal": True, "sinks": sinks}, {"sinks": sinks}):
        # A query that sees nothing has lse -inf, where there is nothing to differentiate.
        seen = attention(*tensors, return_lse=True, **options)[1].isfinite()

        def gradients(function, double, options=options, seen=seen):
            named = {"q": tensors[0], "k": tensors[1], "v": tensors[2], **options}
            leaves = {
                name: (x.double() if double else x.clone()).requires_grad_()
                for name, x in named.items()
                if isinstance(x, torch.Tensor)
            }
            out, lse = function(**{**named, **leaves})
            outputs = [torch.where(seen.mT[..., None], out, 0), lse[seen]]
            result = torch.autograd.grad(
                outputs, list(leaves.values()), [grad.to(out.dtype), grad_lse[seen].to(lse.dtype)]
            )
            return dict(zip(leaves, result, strict=True))

        exact = gradients(_with_sink_column, True)
        twin = gradients(_with_sink_column, False) if dtype == torch.float32 else dict.fromkeys(exact)
        got = gradients(functools.partial(attention, return_lse=True), False)
        reference = gradients(functools.partial(attention_reference, return_lse=True), True)
        scale = max(x.abs().max().item() for x in tensors) * shape[-1] ** -0.5
        dout = grad.double().norm(dim=-1).max().item() * tensors[2].double().norm(dim=-1).max().item()
        summand = (dout + grad_lse.abs().max().item()) * scale
        terms = max(shape[0], shape[1] * shape[-1])
        rounding = 2.0**15 / terms**0.5 if dtype == torch.bfloat16 else 1.0
        for name in exact:
            assert (reference[name] - exact[name]).abs().max() <= 1e-12 * max(1, exact[name].abs().max())
            assert_close_to_exact(
                got[name], exact[name], twin[name], terms=terms, summand=summand * rounding,
                what=f"gradient of {name}",
            )  # fmt: skip


def test_lse_alone_may_be_differentiated() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 12, 12, 2, 1, 8, torch.float32))
    fused = torch.randn(1, 12, 32, requires_grad=True)
    for got, exact, leaves in (
        (attention(q, k, v, return_lse=True)[1], attention_reference(q, k, v, return_lse=True)[1], (q, k, v)),
        (
            attention_qkv(fused, 2, 1, return_lse=True)[1],
            attention_reference(*fused.view(1, 12, 4, 8).split([2, 1, 1], 2), return_lse=True)[1],
            (fused,),
        ),
    ):
        a = torch.autograd.grad(got.sin().sum(), leaves)
        b = torch.autograd.grad(exact.sin().sum(), leaves, allow_unused=True)
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, torch.zeros_like(x) if y is None else y, rtol=1e-5, atol=1e-6)


def test_a_sink_takes_all_where_nothing_is_seen_and_none_at_minus_infinity() -> None:
    q, k, v = inputs(1, 40, 20, 2, 1, 16, torch.float32)
    out, lse = attention(q, k, v, causal=True, sinks=torch.tensor([1.0, -2.0]), return_lse=True)
    assert not out[:, :20].any() and (lse[0, :, :20] - torch.tensor([[1.0], [-2.0]])).abs().max() < 1e-6
    assert out[:, 20:].all()
    plain = attention(q, k, v, causal=True)
    none = attention(q, k, v, causal=True, sinks=torch.full((2,), -float("inf")))
    assert (none - plain).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_sinks_and_lse_have_the_same_bits_for_every_thread_count(threads: None, dtype) -> None:
    tensors, sinks = inputs(3, 200, 260, 6, 2, 64, dtype), torch.randn(6)

    def step() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*tensors, sinks)]
        out, lse = attention(*leaves[:3], causal=True, sinks=leaves[3], return_lse=True)
        return list(torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves))

    assert_same_for_threads(step)


@pytest.mark.parametrize("op", [attention, attention_qkv, attention_backward, attention_reference])
def test_an_unknown_option_is_named_with_its_op(op: Any) -> None:
    x = torch.zeros(1, 3, 2, 8)
    tensors = {attention_qkv: (x.flatten(2).repeat(1, 1, 3), 2, 2), attention_backward: (x,) * 6}
    with pytest.raises(TypeError, match=rf"{op.__name__}.* unexpected keyword argument 'softcap'"):
        op(*tensors.get(op, (x, x, x)), softcap=1.0)


def _call(**options: Any) -> Any:
    return attention(torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8), **options)


BAD = [
    ({"soft_cap": -1.0}, ValueError, "'soft_cap': got -1"),
    ({"soft_cap": float("inf")}, ValueError, "'soft_cap': got inf"),
    (
        {"alibi_slopes": torch.zeros(4).bfloat16()},
        TypeError,
        "'alibi_slopes': got bfloat16, expected float32",
    ),
    ({"alibi_slopes": torch.zeros(2)}, ValueError, "'alibi_slopes': got shape (2,), expected shape (4,)"),
    (
        {"alibi_slopes": torch.zeros(3, 4)},
        ValueError,
        "'alibi_slopes': got shape (3, 4), expected shape (2, 4)",
    ),
    ({"attn_mask": torch.zeros(3, 5)}, TypeError, "'attn_mask': got float32, expected bool"),
    ({"attn_bias": torch.zeros(3, 5).double()}, TypeError, "'attn_bias': got float64, expected float32"),
    ({"attn_bias": torch.zeros(2, 5)}, ValueError, "'attn_bias': got float32 (2, 5), expected a shape"),
    ({"attn_bias": torch.zeros(3, 1)}, ValueError, "a shape that broadcasts to (2, 4, 3, 5)"),
    ({"sinks": torch.zeros(3)}, ValueError, "'sinks': got shape (3,), expected shape (4,)"),
    ({"sinks": torch.zeros(4).bfloat16()}, TypeError, "'sinks': got bfloat16, expected float32"),
]


@pytest.mark.parametrize("options, error, text", BAD)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        _call(**options)
