"""``torch.nn.Embedding`` over ``ops.embedding``, whose gradient is summed in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore import backend, ops
from gptcore.nn.half_precision import in_f32, is_half
from gptcore.nn.support import covered

_embedding = in_f32(ops.embedding)


class Embedding(torch.nn.Embedding):
    """Rows of a table; ``max_norm``, ``scale_grad_by_freq`` and ``sparse`` go to torch and are reported."""

    def reset_parameters(self) -> None:
        """Draw the table as torch does; on the meta device, where there is nothing to draw, torch would load its
        compiler for it: a second and 80 MB."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            backend.note_fallback("embedding", "max_norm, scale_grad_by_freq or sparse")
            return super().forward(input)
        if not is_half(self.weight) and not covered("embedding", self.weight):
            return super().forward(input)
        if self.padding_idx is None:
            return _embedding(input, self.weight)
        # the padding row gets no gradient: its rows of the output are taken out of the graph
        padding = (input == self.padding_idx).unsqueeze(-1)
        rows = _embedding(input, self.weight)
        return torch.where(padding, rows.detach(), rows)
