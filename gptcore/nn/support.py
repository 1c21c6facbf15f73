"""Whether a kernel may stand in: for a call by its tensors, for a module by who watches it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptcore import backend


def covered(call: str, x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the kernels take these tensors: CPU, f32 or bf16. What they don't is noted for the report."""
    tensors = [x, *(p for p in parameters if p is not None)]
    if all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors):
        return True
    if not torch.compiler.is_compiling():
        backend.note_fallback(call, f"{x.dtype} on {x.device.type}")
    return False


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks or wrapper want to see the module's calls, so that none may be left out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
