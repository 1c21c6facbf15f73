"""``torch.nn.GELU`` and ``torch.nn.SiLU`` over the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore import backend, ops
from gptcore.nn.support import covered


class GELU(torch.nn.GELU):
    """GELU, ``approximate`` "none" (error function) or "tanh"."""

    def forward(self, input: Tensor) -> Tensor:
        if not covered("gelu", input):
            return super().forward(input)
        return ops.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """x * sigmoid(x); ``inplace`` writes the result back into the input, as torch's does."""

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace:
            backend.note_fallback("silu", "inplace")
            return super().forward(input)
        if not covered("silu", input):
            return super().forward(input)
        return ops.silu(input)
