"""Scaled dot-product attention, fused: causal, windowed, grouped heads, packed documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty, empty_like, is_torch, last_contiguous
from gptcore.ops.attention_dense import dense_attention, packed_attention
from gptcore.ops.attention_options import (
    BIAS,
    MASK,
    OPTIONS,
    SCHEMA,
    SINKS,
    TENSOR_OPTIONS,
    AttentionOptions,
    values_of,
)
from gptcore.ops.registration import TorchOp, refuse_out_with_grad

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    attn_mask: Array | None = None,
    attn_bias: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    offset: int = 0,
    prefix_lengths: Array | None = None,
    sparse_stride: int = 0,
    sparse_summary: int = 0,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """``softmax(softmax_scale * q @ k.T) @ v`` over the keys each query sees, head by head.

    Args:
        q: (B, T, H, D), f32 or bf16, on CUDA also f16, 1 <= D <= 256; torch tensor (differentiable), NumPy or CuPy
            array. Any strides with a contiguous last dimension are read in place, so views of a fused projection are
            fine.
        k, v: (B, S, Hkv, D) of q's dtype; Hkv divides H, query head h reads key head h // (H // Hkv).
        causal: the last query sees the last key, the one before it all but that, and so on (bottom-right).
        window_size: keys seen to the left and right of a query's own place, inclusive; -1 means all.
        softmax_scale: default D ** -0.5.
        soft_cap: scaled scores s become soft_cap * tanh(s / soft_cap), above 0; default none (Gemma 2: 50).
        alibi_slopes: (H,) or (B, H) f32, B counting documents when packed: slope * |distance| is subtracted from a
            score, the distance being that to the query's own place. Constants: they get no gradient.
        attn_mask: bool, broadcasts to (B, H, T, S) with S its own: True where a query may see a key, besides
            ``causal`` and ``window_size``. Not with cu_seqlens.
        attn_bias: the same shapes, f32 or q's dtype: added to the scores after soft cap and ALiBi. Differentiable
            where T is its own; the gradient is summed over what was broadcast, in order. Not with cu_seqlens.
        sinks: (H,) f32, a score per head that joins each row's softmax but leads to no value (Xiao et al. 2023);
            differentiable. lse counts it.
        dropout_p: probability with which each weight of the softmax is dropped, to the nearest 1/65536; the others
            count 1 / (1 - dropout_p) times. Default 0.
        seed: for ``dropout_p`` above 0: what is dropped is a function of seed, offset and place (sequence or
            document, head, query and key within it). An int of 64 bits, or an array of one int64.
        offset: 0 to 2**32 - 1: tells layers or steps that share a seed apart.
        prefix_lengths: (B,) int32, or one for each packed document: all queries of sequence b also see its first
            prefix_lengths[b] keys (prefix language models); with ``causal`` and no left bound. Default none.
        sparse_stride: 0, or a pattern of the Sparse Transformer, with ``causal``; blocks that nothing sees are skipped.
            Strided: the last sparse_stride keys and every sparse_stride-th before them.
        sparse_summary: above 0 the fixed pattern: the keys of a query's own block of sparse_stride, and the last
            sparse_summary of every block before.
        cu_seqlens_q: (documents + 1,) int32, from 0 to total: packed documents that do not see each other. Then
            q is (total, H, D), k and v (total_k, Hkv, D).
        cu_seqlens_k: the same for keys; default ``cu_seqlens_q``.
        return_lse: also return the logarithm of each row's softmax denominator.
        out: where to write; shape and dtype of ``q``. Not differentiable.

    Returns:
        ``out`` like ``q``; with ``return_lse`` the pair ``(out, lse)``, lse (B, H, T) or (H, total) f32. A query
        that sees no key has out 0 and lse -inf, or its sink. lse is differentiable, and that of the softmax before
        dropout.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, lengths that do not fit; nothing is written then.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2; tiling and recomputation after Dao et
    al. 2022, "FlashAttention"; prefixes after Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a
    Unified Text-to-Text Transformer", section 3.2.1; patterns after Child et al. 2019, "Generating Long Sequences
    with Sparse Transformers", section 4; dropout by Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"). Scores, softmax and sums are f32; with bf16 tensors the probabilities are rounded
    to bf16 before they meet v where the processor multiplies bf16.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    options = values_of(
        q, q.shape[-1], causal, window_size, softmax_scale, soft_cap, alibi_slopes, attn_mask, attn_bias, sinks,
        dropout_p, seed, offset, prefix_lengths, sparse_stride, sparse_summary,
    )  # fmt: skip
    if out is None and is_torch(q):
        result = _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *options, return_lse)
        return result[0] if type(result) is tuple and not return_lse else result
    if is_torch(q):
        refuse_out_with_grad("attention", q, k, v)
    lse = new_lse(q) if return_lse else None
    out = empty_like(q) if out is None else out
    _run(q, k, v, cu_seqlens_q, cu_seqlens_k, options, out, lse)
    return (out, lse) if return_lse else out


def attention_qkv(
    qkv: Array,
    num_heads: int,
    num_kv_heads: int,
    *,
    cu_seqlens_q: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Unpack[AttentionOptions],
) -> Any:
    """:func:`attention` on the output of a fused projection; backward writes one gradient for all of it.

    Args:
        qkv: (B, T, (H + 2 Hkv) D), or (total, (H + 2 Hkv) D) with ``cu_seqlens_q``: the query heads, then the key
            heads, then the value heads.
        num_heads, num_kv_heads: H and Hkv. The others as in :func:`attention`.

    Returns:
        (B, T, H D) or (total, H D); with ``return_lse`` the pair with lse. :func:`attention_qkv_backward` needs both.
    """
    _, _, _, size = _check_fused(qkv, num_heads, num_kv_heads)
    values = option_values("attention_qkv", qkv, size, options)
    if out is None and is_torch(qkv):
        result = _attention_qkv(qkv, cu_seqlens_q, num_heads, num_kv_heads, *values, return_lse)
        return result if return_lse else result[0]
    if is_torch(qkv):
        refuse_out_with_grad("attention_qkv", qkv)
    out = empty(qkv, (*qkv.shape[:-1], num_heads * size)) if out is None else out
    lse = _new_lse_qkv(qkv, num_heads) if return_lse else None
    q, k, v = _split(last_contiguous(qkv), num_heads, num_kv_heads)
    _run(q, k, v, cu_seqlens_q, cu_seqlens_q, values, _as_heads(out, num_heads, size), lse)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    dlse: Array | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, ...]:
    """Gradients ``(dq, dk, dv)`` of :func:`attention` from ``dout`` (like ``out``), ``dlse`` (like ``lse``; default:
    zeros) and what forward returned; then those of ``attn_bias`` and ``sinks``, f32, as far as they are given."""
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    values = option_values("attention_backward", q, q.shape[-1], options)
    gradients = _run_backward(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *values, dlse, values[BIAS] is not None
    )
    return tuple(x for x in gradients if x is not None)


def attention_qkv_backward(
    dout: Array,
    qkv: Array,
    out: Array,
    lse: Array,
    num_heads: int,
    num_kv_heads: int,
    *,
    cu_seqlens_q: Array | None = None,
    dlse: Array | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, ...]:
    """Gradient ``(dqkv,)`` of :func:`attention_qkv`; then those of ``attn_bias`` and ``sinks``, as
    :func:`attention_backward` has them."""
    _, _, _, size = _check_fused(qkv, num_heads, num_kv_heads)
    values = option_values("attention_qkv_backward", qkv, size, options)
    gradients = _qkv_run_backward(
        dout, qkv, out, lse, cu_seqlens_q, num_heads, num_kv_heads, *values, dlse, values[BIAS] is not None
    )
    return tuple(x for x in gradients if x is not None)


def attention_reference(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times, lse included."""
    values = option_values("attention_reference", q, q.shape[-1], options)
    named = dict(zip(OPTIONS, values, strict=True))
    if cu_seqlens_q is None:
        out, lse = dense_attention(q, k, v, **named)
    else:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        out, lse = packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, named)
    return (out, lse) if return_lse else out


_DEFAULTS = {
    name: value
    for name, value in (attention.__kwdefaults__ or {}).items()
    if name in AttentionOptions.__annotations__
}


def option_values(op: str, like: Array, head_dim: int, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Values for ``OPTIONS`` from the keyword options that ``op`` was given.

    Raises:
        TypeError: an option that there is not.
    """
    for name in options:
        if name not in _DEFAULTS:
            raise TypeError(
                f"{op}: got an unexpected keyword argument {name!r}, expected {', '.join(_DEFAULTS)}"
            )
    return values_of(like, head_dim, **{**_DEFAULTS, **options})


def new_lse(q: Array) -> Array:
    """Room for lse: (B, H, T), or (H, total) of packed documents."""
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[-2], q.shape[0])
    return empty(q, shape, "float32")


def _new_lse_qkv(qkv: Array, heads: int) -> Array:
    lead = qkv.shape[:-1]
    return empty(qkv, (lead[0], heads, lead[1]) if len(lead) == 2 else (heads, lead[0]), "float32")


def _check_fused(qkv: Array, heads: int, kv_heads: int) -> tuple[int, int, int, int]:
    """(heads, kv_heads, their sum in qkv, D)."""
    total, width = heads + 2 * kv_heads, qkv.shape[-1]
    if heads < 1 or kv_heads < 1 or width % total:
        raise ValueError(
            f"attention_qkv: argument 'qkv': got a last dimension of {width}, expected (num_heads + 2 * "
            f"num_kv_heads) * D with num_heads {heads} and num_kv_heads {kv_heads}, each at least 1"
        )
    return heads, kv_heads, total, width // total


def _as_heads(x: Array, heads: int, size: int) -> Array:
    """(..., heads * size) as (..., heads, size), a view."""
    return x.unflatten(-1, (heads, size)) if is_torch(x) else x.reshape(*x.shape[:-1], heads, size)


def _split(qkv: Array, heads: int, kv_heads: int) -> tuple[Array, Array, Array]:
    """Views of query, key and value heads within a fused projection."""
    heads, kv_heads, total, size = _check_fused(qkv, heads, kv_heads)
    x = _as_heads(qkv, total, size)
    return x[..., :heads, :], x[..., heads : heads + kv_heads, :], x[..., heads + kv_heads :, :]


def _readable(options: Sequence[Any]) -> Sequence[Any]:
    """The options, tensors with a contiguous last dimension."""
    if options[BIAS] is None and options[MASK] is None:
        return options
    return [last_contiguous(x) if i in (BIAS, MASK) else x for i, x in enumerate(options)]


def _run(
    q: Array, k: Array, v: Array, cu_q: Any, cu_k: Any, options: Sequence[Any], out: Array, lse: Any
) -> None:
    backend.extension().attention_forward(
        last_contiguous(q), last_contiguous(k), last_contiguous(v), cu_q, cu_k, _readable(options), out, lse
    )


def _option_outputs(x: Array, options: Sequence[Any], bias_grad: bool) -> tuple[Any, Any]:
    """Room for dbias and dsinks; None for what is not wanted."""
    bias, sinks = options[BIAS], options[SINKS]
    return (
        empty(x, bias.shape, "float32") if bias_grad else None,
        None if sinks is None else empty(x, sinks.shape, "float32"),
    )


def _run_backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, cu_q: Any, cu_k: Any, *options: Any
) -> tuple[Array, ...]:
    """(dq, dk, dv, dbias, dsinks); after the options dlse or None, and whether dbias is wanted."""
    *given, dlse, bias_grad = options
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    more = _option_outputs(q, given, bias_grad)
    backend.extension().attention_backward(
        last_contiguous(dout), last_contiguous(q), last_contiguous(k), last_contiguous(v), last_contiguous(out), lse,
        cu_q, cu_k, _readable(given), dq, dk, dv, dlse, *more,
    )  # fmt: skip
    return dq, dk, dv, *more


# --- torch ------------------------------------------------------------------------------------------------------
# attention(q, k, v, ...) -> (out, lse) and attention_qkv(qkv, ...) -> (out, lse), with their backward ops. The
# last argument says whether lse is wanted: without gradients it is not even computed otherwise.


def _save(ctx: Any, options: list[Any], lse: Any, *tensors: Any) -> None:
    """Keeps for backward what it needs, the options that are tensors where autograd sees them. The last says whether
    lse is wanted, and so whether it may have a gradient."""
    ctx.set_materialize_grads(False)
    if not options.pop():
        ctx.mark_non_differentiable(lse)
    given = [options[i] for i in TENSOR_OPTIONS]
    if any(x is not None for x in given):
        tensors += tuple(given)
        for i in TENSOR_OPTIONS:
            options[i] = None
    ctx.save_for_backward(*tensors)
    ctx.options = options


def _saved(ctx: Any, count: int) -> tuple[Any, list[Any]]:
    """The ``count`` tensors and the options that :func:`_save` kept."""
    tensors, options = ctx.saved_tensors, ctx.options
    if len(tensors) == count:
        return tensors, options
    options = list(options)
    for i, tensor in zip(TENSOR_OPTIONS, tensors[count:], strict=True):
        options[i] = tensor
    return tensors[:count], options


def _forward(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, *options: Any) -> tuple[Any, Any]:
    out, lse = empty_like(q), new_lse(q)
    _run(q, k, v, cu_q, cu_k, options[:-1], out, lse)
    return out, lse


def _inference(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, *options: Any) -> Any:
    out, lse = empty_like(q), new_lse(q) if options[-1] else None
    _run(q, k, v, cu_q, cu_k, options[:-1], out, lse)
    return out if lse is None else (out, lse)


def _eager_forward(ctx: Any, *inputs: Any) -> Any:
    """Without tensors among the options, and without lse, by the extension's hook, whose one output is bare."""
    out = backend.extension().attention_eager_forward(ctx, inputs)
    if out is not None:
        return out
    outputs = _forward(*inputs)
    _setup(ctx, inputs, outputs)
    return outputs


def _fake(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, *options: Any) -> tuple[Any, Any]:
    return q.new_empty(q.shape), new_lse(q)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, cu_q, cu_k, *options = inputs
    out, lse = output
    _save(ctx, options, lse, q, k, v, out, lse, cu_q, cu_k)


def _or_empty(x: Any, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    """An op's outputs are tensors: what is not wanted is empty."""
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


_NO_GRADIENTS: list[Any] = [None] * len(OPTIONS)


def _option_gradients(ctx: Any, before: int, options: Sequence[Any], dbias: Any, dsinks: Any) -> list[Any]:
    """One for each option, of which the first is input ``before``."""
    if options[BIAS] is None and options[SINKS] is None:
        return _NO_GRADIENTS
    gradients: list[Any] = [None] * len(OPTIONS)
    if ctx.needs_input_grad[before + BIAS]:
        gradients[BIAS] = dbias.to(options[BIAS].dtype)
    if ctx.needs_input_grad[before + SINKS]:
        gradients[SINKS] = dsinks
    return gradients


def _bias_grad(ctx: Any, before: int, options: Sequence[Any]) -> bool:
    return options[BIAS] is not None and ctx.needs_input_grad[before + BIAS]


def _given(grad_out: Any, out: Any, grad_lse: Any) -> tuple[Any, Any]:
    """The gradients of both outputs as kernels take them."""
    return (
        out.new_zeros(out.shape) if grad_out is None else grad_out,
        None if grad_lse is None else grad_lse.contiguous(),
    )


def _differentiate(kernel: Any, ctx: Any, grad_out: Any, grad_lse: Any) -> tuple[Any, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * (len(OPTIONS) + 6)
    tensors, options = _saved(ctx, 7)
    dout, dlse = _given(grad_out, tensors[3], grad_lse)
    dq, dk, dv, *more = kernel(dout, *tensors, *options, dlse, _bias_grad(ctx, 5, options))
    return dq, dk, dv, None, None, *_option_gradients(ctx, 5, options, *more), None


def _backward(ctx: Any, grad_out: Any, grad_lse: Any = None) -> tuple[Any, ...]:
    return _differentiate(_attention_backward, ctx, grad_out, grad_lse)


def _eager_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    if len(grads) == 1:
        return backend.extension().attention_eager_backward(ctx, grads[0])
    return _differentiate(_run_backward, ctx, *grads)


def _backward_forward(dout: Any, *inputs: Any) -> tuple[Any, ...]:
    return _or_empty(dout, _run_backward(dout, *inputs))


def _backward_fake(dout: Any, q: Any, k: Any, v: Any, *options: Any) -> tuple[Any, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *_fake_outputs(dout, options)


def _fake_outputs(dout: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """From a backward op's arguments, of which the options, dlse and whether dbias is wanted are last."""
    return _or_empty(dout, _option_outputs(dout, options[-len(OPTIONS) - 2 :], options[-1]))


def _qkv_run(qkv: Any, cu: Any, heads: int, kv_heads: int, options: tuple[Any, ...], lse: Any) -> Any:
    q, k, v = _split(last_contiguous(qkv), heads, kv_heads)
    out = qkv.new_empty((*qkv.shape[:-1], heads * q.shape[-1]))
    _run(q, k, v, cu, cu, options, _as_heads(out, heads, q.shape[-1]), lse)
    return out


def _qkv_forward(qkv: Any, cu: Any, heads: int, kv_heads: int, *options: Any) -> tuple[Any, Any]:
    lse = _new_lse_qkv(qkv, heads)
    return _qkv_run(qkv, cu, heads, kv_heads, options[:-1], lse), lse


def _qkv_inference(qkv: Any, cu: Any, heads: int, kv_heads: int, *options: Any) -> tuple[Any, Any]:
    lse = _new_lse_qkv(qkv, heads) if options[-1] else None
    return _qkv_run(qkv, cu, heads, kv_heads, options[:-1], lse), lse


def _qkv_fake(qkv: Any, cu: Any, heads: int, kv_heads: int, *options: Any) -> tuple[Any, Any]:
    size = qkv.shape[-1] // (heads + 2 * kv_heads)
    return qkv.new_empty((*qkv.shape[:-1], heads * size)), _new_lse_qkv(qkv, heads)


def _qkv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    qkv, cu, heads, kv_heads, *options = inputs
    out, lse = output
    _save(ctx, options, lse, qkv, out, lse, cu)
    ctx.heads = heads, kv_heads


def _qkv_differentiate(kernel: Any, ctx: Any, grad_out: Any, grad_lse: Any) -> tuple[Any, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * (len(OPTIONS) + 5)
    tensors, options = _saved(ctx, 4)
    dout, dlse = _given(grad_out, tensors[1], grad_lse)
    dqkv, *more = kernel(dout, *tensors, *ctx.heads, *options, dlse, _bias_grad(ctx, 4, options))
    return dqkv, None, None, None, *_option_gradients(ctx, 4, options, *more), None


def _qkv_backward(ctx: Any, grad_out: Any, grad_lse: Any) -> tuple[Any, ...]:
    return _qkv_differentiate(_attention_qkv_backward, ctx, grad_out, grad_lse)


def _qkv_eager_backward(ctx: Any, grad_out: Any, grad_lse: Any) -> tuple[Any, ...]:
    return _qkv_differentiate(_qkv_run_backward, ctx, grad_out, grad_lse)


def _qkv_run_backward(
    dout: Any, qkv: Any, out: Any, lse: Any, cu: Any, heads: int, kv_heads: int, *options: Any
) -> tuple[Any, ...]:
    *given, dlse, bias_grad = options
    dqkv, more = empty_like(qkv), _option_outputs(qkv, given, bias_grad)
    q, k, v = _split(last_contiguous(qkv), heads, kv_heads)
    size = q.shape[-1]
    backend.extension().attention_backward(
        _as_heads(last_contiguous(dout), heads, size), q, k, v, _as_heads(out, heads, size), lse, cu, cu,
        _readable(given), *_split(dqkv, heads, kv_heads), dlse, *more,
    )  # fmt: skip
    return dqkv, *more


def _qkv_backward_forward(dout: Any, *inputs: Any) -> tuple[Any, ...]:
    return _or_empty(dout, _qkv_run_backward(dout, *inputs))


def _qkv_backward_fake(dout: Any, qkv: Any, *options: Any) -> tuple[Any, ...]:
    return qkv.new_empty(qkv.shape), *_fake_outputs(dout, options)


_attention_backward = TorchOp(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens_q, "
    f"Tensor? cu_seqlens_k, {SCHEMA}, Tensor? dlse, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward=_backward_forward,
    fake=_backward_fake,
)
_attention = TorchOp(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, {SCHEMA}, bool want_lse)"
    " -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    eager_forward=_eager_forward,
    eager_backward=_eager_backward,
    inference=_inference,
    lower_precision=True,
    full_precision=tuple(5 + i for i in TENSOR_OPTIONS),
    takes_half=True,
)
_attention_qkv_backward = TorchOp(
    "attention_qkv_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? cu_seqlens, int heads, int kv_heads, "
    f"{SCHEMA}, Tensor? dlse, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    forward=_qkv_backward_forward,
    fake=_qkv_backward_fake,
)
_attention_qkv = TorchOp(
    "attention_qkv",
    f"(Tensor qkv, Tensor? cu_seqlens, int heads, int kv_heads, {SCHEMA}, bool want_lse) -> (Tensor, Tensor)",
    forward=_qkv_forward,
    fake=_qkv_fake,
    setup_context=_qkv_setup,
    backward=_qkv_backward,
    eager_backward=_qkv_eager_backward,
    inference=_qkv_inference,
    lower_precision=True,
    full_precision=tuple(4 + i for i in TENSOR_OPTIONS),
    takes_half=True,
)
