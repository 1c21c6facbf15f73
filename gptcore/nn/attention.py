"""``torch.nn.MultiheadAttention`` over ``functional.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gptcore.functional as F
from gptcore import backend
from gptcore.nn.linear import linear
from gptcore.nn.support import served

_CALL = "multi_head_attention"


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention; arguments, state dict and the meaning of masks (True hides) are torch's.

    The kernel gives no weights, so that ``need_weights=True``, torch's default, goes to torch and is reported, as do
    ``add_bias_kv`` and ``add_zero_attn``. A query that sees no key gets zeros from the kernel, where torch gives NaN.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        reason = self._uncovered(query, key, value, need_weights)
        if reason:
            if not torch.compiler.is_compiling():
                backend.note_fallback(_CALL, reason)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # torch's words
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._projections(query, key, value))
        causal = is_causal and key_padding_mask is None
        mask = None if causal else self._mask(q, key_padding_mask, attn_mask)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=causal
        )
        y = linear(out.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return y.squeeze(0), None
        return y if self.batch_first else y.transpose(0, 1), None

    def _uncovered(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> str | None:
        if need_weights:
            return "need_weights"
        if self.bias_k is not None or self.add_zero_attn:
            return "add_bias_kv or add_zero_attn"
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            return "number of dimensions"
        if not served("attention", query, key, value) and not backend.takes_half(query, key, value):
            return f"{query.dtype} on {query.device.type}"
        return None

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, in as few products as the arguments allow."""
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            inputs = (query, key, value)
            return tuple(linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query is key and key is value:
            return linear(query, weight, bias).chunk(3, dim=-1)
        q = linear(query, weight[:width], None if bias is None else bias[:width])
        if key is value:
            both = linear(key, weight[width:], None if bias is None else bias[width:])
            return q, *both.chunk(2, dim=-1)
        parts = [None] * 3 if bias is None else list(bias.chunk(3))
        k = linear(key, weight[width : 2 * width], parts[1])
        return q, k, linear(value, weight[2 * width :], parts[2])

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """(B, H, T, D) from (B, T, C), (T, B, C) or, without a batch, (T, C)."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, q: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """torch's two masks, of which True hides and numbers are added, as one of SDPA's, of which True shows."""
        if padding is not None:
            padding = padding.view(-1, 1, 1, padding.shape[-1])
        if mask is not None and mask.dim() == 3:
            mask = mask.view(q.shape[0], self.num_heads, *mask.shape[1:])
        given = [m for m in (padding, mask) if m is not None]
        if not given:
            return None
        if all(m.dtype == torch.bool for m in given):
            hidden = given[0] if len(given) == 1 else given[0] | given[1]
            return self._rows(~hidden, q)
        added = [
            torch.zeros_like(m, dtype=q.dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m
            for m in given
        ]
        return self._rows(added[0] if len(added) == 1 else added[0] + added[1], q)

    @staticmethod
    def _rows(mask: Tensor, q: Tensor) -> Tensor:
        return mask if mask.dim() == 2 else mask.expand(-1, -1, q.shape[2], -1)
