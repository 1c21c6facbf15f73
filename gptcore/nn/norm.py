"""``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm`` over the kernels, zero-centred where wanted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import ops
from gptcore.nn.support import covered


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the trailing ``normalized_shape``; arguments and state dict are torch's.

    With ``zero_centred`` the factor is 1 + weight, and the weight starts at 0.

    Raises:
        ValueError: ``zero_centred`` without a weight.
    """

    def __init__(self, *arguments: Any, zero_centred: bool = False, **keywords: Any) -> None:
        self.weight_offset = 1.0 if zero_centred else 0.0  # before the weight is filled
        super().__init__(*arguments, **keywords)
        _check_weight(self)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _centre(self)

    def forward(self, input: Tensor) -> Tensor:
        if not covered("layer_norm", input, self.weight, self.bias):
            return F.layer_norm(input, self.normalized_shape, _factor(self), self.bias, self.eps)
        rows, weight, bias = _over_last(self.normalized_shape, input, self.weight, self.bias)
        y = ops.layer_norm(rows, weight, bias, self.eps, weight_offset=self.weight_offset)
        return y.view(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the trailing ``normalized_shape``; ``eps`` None is torch's default for the dtype.

    With ``zero_centred`` the factor is 1 + weight, and the weight starts at 0 (Gemma).

    Raises:
        ValueError: ``zero_centred`` without a weight.
    """

    def __init__(self, *arguments: Any, zero_centred: bool = False, **keywords: Any) -> None:
        self.weight_offset = 1.0 if zero_centred else 0.0  # before the weight is filled
        super().__init__(*arguments, **keywords)
        _check_weight(self)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _centre(self)

    def forward(self, input: Tensor) -> Tensor:
        if not covered("rms_norm", input, self.weight):
            return F.rms_norm(input, self.normalized_shape, _factor(self), self.eps)
        rows, weight = _over_last(self.normalized_shape, input, self.weight)
        # torch sums bf16 in f32 and takes the epsilon of the type it sums in
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        return ops.rms_norm(rows, weight, eps, weight_offset=self.weight_offset).view(input.shape)


def _check_weight(norm: LayerNorm | RMSNorm) -> None:
    if norm.weight_offset and norm.weight is None:
        raise ValueError(
            f"{type(norm).__name__}: argument 'zero_centred': got True without a weight, "
            "expected elementwise_affine=True"
        )


def _centre(norm: LayerNorm | RMSNorm) -> None:
    if norm.weight_offset and norm.weight is not None:
        torch.nn.init.zeros_(norm.weight)


def _factor(norm: LayerNorm | RMSNorm) -> Tensor | None:
    """The whole factor, for torch's norms, which take no offset."""
    return norm.weight + norm.weight_offset if norm.weight_offset else norm.weight


def _over_last(shape: tuple[int, ...], x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """``x`` (..., *shape) and its parameters with the normalised dimensions flattened into the last."""
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise RuntimeError(f"given normalized_shape={list(shape)}, got an input of shape {list(x.shape)}")
    if len(shape) == 1:
        return [x, *parameters]
    return [x.flatten(-len(shape)), *(None if p is None else p.flatten() for p in parameters)]
