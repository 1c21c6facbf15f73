"""Parts of parameters in host memory, where the optimizer's states, masters and kernels are, beside a device's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class HostParts:
    """Copies of weights in host memory, for an optimizer to work on.

    What travels is pinned, so that copies run beside the processor: gradients down, weights up. States are made where
    their parameters are, and never leave the host.
    """

    def __init__(self) -> None:
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._gradients: dict[Tensor, Tensor] = {}

    def part(self, weights: Tensor) -> nn.Parameter:
        """A parameter of the same elements in host memory; :meth:`up` writes them back to ``weights``."""
        part = nn.Parameter(_beside(weights).copy_(weights))
        self._weights[part] = weights
        return part

    def down(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The gradients of parts in host memory, in buffers that are kept from step to step."""
        for part, gradient in gradients.items():
            if part not in self._gradients or self._gradients[part].dtype != gradient.dtype:
                self._gradients[part] = _beside(gradient)
            self._gradients[part].copy_(gradient, non_blocking=True)
        for device in {gradient.device for gradient in gradients.values() if gradient.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return {part: self._gradients[part] for part in gradients}

    @torch.no_grad()
    def up(self) -> None:
        """Send all parts to the device's weights. Whatever uses these comes after on the same stream, and so does the
        next step's :meth:`down`, which waits, before a part is written again."""
        for part, weights in self._weights.items():
            weights.copy_(part, non_blocking=True)


def _beside(tensor: Tensor) -> Tensor:
    """Host memory for as many elements."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
