"""The norm of a block: LayerNorm or RMSNorm, zero-centred or not, with the residual add inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptcore import ops
from gptcore.models.config import NormSpec


class Norm(nn.Module):
    """Normalises the last dimension, of ``width``."""

    def __init__(self, spec: NormSpec, width: int, kind: str | None = None) -> None:
        super().__init__()
        self.kind = kind or spec.kind
        self.eps = spec.eps
        self.zero_centred = spec.zero_centred
        self.weight = nn.Parameter(torch.empty(width))
        bias = self.kind == "layer_norm" and spec.has_bias
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def gain(self) -> Tensor:
        """The factor applied: the weight, or 1 + weight in f32, where bf16 would lose the small weight."""
        return self.weight.float() + 1.0 if self.zero_centred else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """norm(x) for x (..., width)."""
        if self.kind == "rms_norm":
            return ops.rms_norm(x, self.gain(), self.eps)
        return ops.layer_norm(x, self.gain(), self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(h), h) with h = x + residual, in one pass."""
        if residual is None:
            return self(x), x
        if self.kind == "rms_norm":
            return ops.rms_norm(x, self.gain(), self.eps, residual=residual)
        return ops.layer_norm(x, self.gain(), self.bias, self.eps, residual=residual)
