"""``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm`` over the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore import ops
from gptcore.nn.support import covered


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the trailing ``normalized_shape``; arguments and state dict are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if not covered("layer_norm", input, self.weight, self.bias):
            return super().forward(input)
        rows, weight, bias = _over_last(self.normalized_shape, input, self.weight, self.bias)
        return ops.layer_norm(rows, weight, bias, self.eps).view(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the trailing ``normalized_shape``; ``eps`` None is torch's default for the dtype."""

    def forward(self, input: Tensor) -> Tensor:
        if not covered("rms_norm", input, self.weight):
            return super().forward(input)
        rows, weight = _over_last(self.normalized_shape, input, self.weight)
        # torch sums bf16 in f32 and takes the epsilon of the type it sums in
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        return ops.rms_norm(rows, weight, eps).view(input.shape)


def _over_last(shape: tuple[int, ...], x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """``x`` (..., *shape) and its parameters with the normalised dimensions flattened into the last."""
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise RuntimeError(f"given normalized_shape={list(shape)}, got an input of shape {list(x.shape)}")
    if len(shape) == 1:
        return [x, *parameters]
    return [x.flatten(-len(shape)), *(None if p is None else p.flatten() for p in parameters)]
