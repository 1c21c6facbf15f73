"""Whether a kernel may stand in: for a call by its tensors, for a module by who watches it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptcore import backend

_DTYPES = (torch.float32, torch.bfloat16)
# The kernels of calls that are not named after theirs.
_KERNELS = {
    "feed_forward": ("gated_activation",),
    "gelu": ("gated_activation",),
    "silu": ("gated_activation",),
    "moe": ("moe_router", "moe_dispatch", "grouped_linear"),
}


def covered(call: str, x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the kernels take these tensors: f32 or bf16, on one device that they are for. What they don't is noted
    for the report."""
    tensors = [x, *(p for p in parameters if p is not None)]
    if served(call, *tensors):
        return True
    if not torch.compiler.is_compiling():
        backend.note_fallback(call, f"{x.dtype} on {x.device.type}")
    return False


def served(call: str, *tensors: Tensor) -> bool:
    """As :func:`covered`, without a note."""
    if all(t.device.type == "cpu" and t.dtype in _DTYPES for t in tensors):
        return True
    device = tensors[0].device
    return (
        device.type != "cpu"
        and all(t.device == device and t.dtype in _DTYPES for t in tensors)
        and backend.has_kernels(device, *_KERNELS.get(call, (call,)))
    )


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks or wrapper want to see the module's calls, so that none may be left out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
