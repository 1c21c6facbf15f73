"""Attention in plain torch, scores and all: what attention's reference is made of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from gptcore.ops.attention_dropout import dropout_factors


def dense_attention(
    q: Any, k: Any, v: Any, *, softmax_scale: float, causal: bool, left: int, right: int, soft_cap: float,
    alibi_slopes: Any, attn_mask: Any, attn_bias: Any, sinks: Any, dropout_p: float, seed: Any, offset: int,
    prefix_lengths: Any, sparse_stride: int, sparse_summary: int, first: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """``(out, lse)`` for (B, T, H, D) and (B, S, Hkv, D); options as the kernel takes them.

    Args:
        first: number of the first sequence, where it is a packed document.
    """
    import torch

    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // max(k.shape[2], 1)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    place = torch.arange(queries, device=q.device)[:, None] + keys - queries
    key = torch.arange(keys, device=q.device)[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * (place - key).abs()
    if attn_bias is not None:
        scores = scores + attn_bias
    hidden = _outside(place, key, left, 0 if causal else right)
    if prefix_lengths is not None:
        hidden = hidden & (key >= prefix_lengths[first : first + len(q), None, None, None])
    if sparse_stride:
        hidden = hidden | ~_pattern(place, key, sparse_stride, sparse_summary)
    if attn_mask is not None:
        hidden = hidden | ~attn_mask
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1) if keys else scores.new_full(scores.shape[:3], float("-inf"))
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    # Rows that see nothing: any finite number in place of -inf keeps values and gradients at exactly 0.
    p = (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
    if dropout_p:
        p = p * dropout_factors(p.shape, dropout_p, seed, offset, first=first).to(p)
    return torch.einsum("bhts,bshd->bthd", p, v), lse


def _outside(place: Any, key: Any, left: int, right: int) -> Any:
    """(T, S): True beyond the window around each query's own place."""
    import torch

    hidden = torch.zeros(len(place), key.shape[1], dtype=torch.bool, device=key.device)
    if left >= 0:
        hidden = hidden | (key < place - left)
    if right >= 0:
        hidden = hidden | (key > place + right)
    return hidden


def _pattern(place: Any, key: Any, stride: int, summary: int) -> Any:
    """(T, S): True where a pattern of the Sparse Transformer attends, causality apart."""
    if summary == 0:
        return (place - key <= stride) | ((place - key) % stride == 0)
    return (place // stride == key // stride) | (key % stride >= stride - summary)


def packed_attention(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, options: dict[str, Any]
) -> tuple[Any, Any]:
    """``(out, lse)`` for (total, H, D) and (total_k, Hkv, D), document by document."""
    import torch

    outs, lses = [q[:0]], [q.new_zeros((q.shape[1], 0))]
    slopes = options["alibi_slopes"]
    documents = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for i, ((a, b), (c, d)) in enumerate(documents):
        own = slopes[i : i + 1] if slopes is not None and slopes.ndim == 2 else slopes
        one = {**options, "alibi_slopes": own}
        out, lse = dense_attention(q[None, a:b], k[None, c:d], v[None, c:d], **one, first=i)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)
