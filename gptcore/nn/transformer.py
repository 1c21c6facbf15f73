"""``torch.nn.TransformerEncoderLayer`` over the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gptcore.functional as F
from gptcore.nn.attention import MultiheadAttention
from gptcore.nn.norm import LayerNorm

# torch's functions that the layer may hold as its activation, and ours.
_ACTIVATIONS = {torch.nn.functional.gelu: F.gelu, torch.nn.functional.silu: F.silu}


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and feed-forward with their norms; arguments and state dict are torch's.

    torch's own layer has a fused path for evaluation without gradients; this one computes training and evaluation
    alike, on the kernels.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        # The parts keep their parameters, drawn in torch's order, and get another forward.
        self.self_attn.__class__ = MultiheadAttention
        for norm in (self.norm1, self.norm2):
            norm.__class__ = LayerNorm
            norm.weight_offset = 0.0  # type: ignore[assignment]
        self.activation: Any = _ACTIVATIONS.get(self.activation, self.activation)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))
