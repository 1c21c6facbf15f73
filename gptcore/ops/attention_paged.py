"""Attention over a cache of keys and values in pages, which sequences of any length share."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty_like, is_torch, last_contiguous
from gptcore.ops.attention import new_lse, option_values
from gptcore.ops.attention_dense import dense_attention
from gptcore.ops.attention_options import OPTIONS, SCHEMA
from gptcore.ops.registration import TorchOp, refuse_out_with_grad


def attention_paged(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    cache_seqlens: Array,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """:func:`gptcore.ops.attention` of the last T tokens of each sequence, its keys and values read from pages.

    Args:
        q: (B, T, H, D), f32 or bf16, on CUDA also f16, 1 <= D <= 256: the queries of the last T tokens of every
            sequence. One when decoding, more for a chunk of a prompt.
        k_pages, v_pages: (pages, page_size, Hkv, D) of q's dtype, the last dimension contiguous: those T tokens' own
            keys and values are already there. Places that no sequence's length covers are not read.
        block_table: (B, blocks) int32: key s of sequence b stands at place s % page_size of page
            block_table[b, s // page_size]. Entries behind a sequence's last page may be anything.
        cache_seqlens: (B,) int32: the keys of each sequence, 0 to blocks * page_size.
        causal, window_size, softmax_scale, soft_cap, alibi_slopes, sinks, return_lse, out: as in
            :func:`gptcore.ops.attention`, the last query of a sequence at its last key.

    Returns:
        ``out`` like ``q``; with ``return_lse`` the pair ``(out, lse)``, lse (B, H, T) f32. There is no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, lengths or pages that do not fit; nothing is written then. On
            CUDA lengths and pages are not read by the host: those out of bounds are taken for the nearest that is not.

    The bits are those of :func:`gptcore.ops.attention` on each sequence's keys, on CUDA for T up to 16. They know
    neither the other sequences nor how long the table is, so a step that a CUDA graph has captured serves a cache as
    it grows.

    Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"; keys
    split over a GPU after Dao et al. 2023, "Flash-Decoding for long-context inference".
    """
    given = {
        "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "soft_cap": soft_cap,
        "alibi_slopes": alibi_slopes, "sinks": sinks,
    }  # fmt: skip
    options = option_values("attention_paged", q, q.shape[-1], given)
    inputs = (q, k_pages, v_pages, block_table, cache_seqlens)
    if out is None and is_torch(q):
        result = _attention_paged(*inputs, *options, return_lse)
        return result[0] if type(result) is tuple and not return_lse else result
    if is_torch(q):
        refuse_out_with_grad("attention_paged", q, k_pages, v_pages)
    out = empty_like(q) if out is None else out
    lse = new_lse(q) if return_lse else None
    _run(inputs, options, out, lse)
    return (out, lse) if return_lse else out


def attention_paged_reference(
    q: Any, k_pages: Any, v_pages: Any, block_table: Any, cache_seqlens: Any, *, return_lse: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """The same in plain torch, sequence by sequence, any floating dtype, differentiable any number of times."""
    import torch

    values = option_values("attention_paged_reference", q, q.shape[-1], options)
    named = dict(zip(OPTIONS, values, strict=True))
    slopes, page_size = named.pop("alibi_slopes"), k_pages.shape[1]
    outs, lses = [q[:0]], [q.new_zeros((0, q.shape[2], q.shape[1]))]
    for b, length in enumerate(cache_seqlens.tolist()):
        pages = block_table[b, : -(-length // page_size)].long()
        k, v = (x[pages].flatten(0, 1)[None, :length] for x in (k_pages, v_pages))
        own = slopes[b : b + 1] if slopes is not None and slopes.ndim == 2 else slopes
        out, lse = dense_attention(q[b : b + 1], k, v, alibi_slopes=own, **named)
        outs.append(out)
        lses.append(lse)
    return (torch.cat(outs), torch.cat(lses)) if return_lse else torch.cat(outs)


def _run(inputs: tuple[Any, ...], options: tuple[Any, ...], out: Array, lse: Any) -> None:
    q, *cache = inputs  # a copy of a cache would cost more than the call
    backend.extension().attention_paged(last_contiguous(q), *cache, options, out, lse)


def _forward(*inputs: Any) -> tuple[Any, Any]:
    out, lse = empty_like(inputs[0]), new_lse(inputs[0])
    _run(inputs[:5], inputs[5:-1], out, lse)
    return out, lse


def _inference(*inputs: Any) -> Any:
    out, lse = empty_like(inputs[0]), new_lse(inputs[0]) if inputs[-1] else None
    _run(inputs[:5], inputs[5:-1], out, lse)
    return out if lse is None else (out, lse)


def _fake(q: Any, *_: Any) -> tuple[Any, Any]:
    return q.new_empty(q.shape), new_lse(q)


_attention_paged = TorchOp(
    "attention_paged",
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor cache_seqlens, "
    f"{SCHEMA}, bool want_lse) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    inference=_inference,
    takes_half=True,
)
