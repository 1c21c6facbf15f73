"""The norm of a block: LayerNorm or RMSNorm, zero-centred or not, with the residual add inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptcore import ops
from gptcore.models.config import NormSpec
from gptcore.nn.half_precision import in_f32

_rms_norm, _layer_norm = in_f32(ops.rms_norm), in_f32(ops.layer_norm)


class Norm(nn.Module):
    """Normalises the last dimension, of ``width``."""

    def __init__(self, spec: NormSpec, width: int, kind: str | None = None) -> None:
        super().__init__()
        self.kind = kind or spec.kind
        self.eps = spec.eps
        self.zero_centred = spec.zero_centred
        self.weight_offset = 1.0 if spec.zero_centred else 0.0
        self.weight = nn.Parameter(torch.empty(width))
        bias = self.kind == "layer_norm" and spec.has_bias
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """norm(x) for x (..., width)."""
        offset = self.weight_offset
        if self.kind == "rms_norm":
            return _rms_norm(x, self.weight, self.eps, weight_offset=offset)
        return _layer_norm(x, self.weight, self.bias, self.eps, weight_offset=offset)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(h), h) with h = x + residual, in one pass."""
        if residual is None:
            return self(x), x
        offset = self.weight_offset
        if self.kind == "rms_norm":
            return _rms_norm(x, self.weight, self.eps, weight_offset=offset, residual=residual)
        return _layer_norm(x, self.weight, self.bias, self.eps, weight_offset=offset, residual=residual)
