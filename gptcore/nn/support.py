"""Whether a kernel covers a call, and the note where it does not."""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore import backend


def covered(call: str, x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the kernels take these tensors: CPU, f32 or bf16. What they don't is noted for the report."""
    tensors = [x, *(p for p in parameters if p is not None)]
    if all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors):
        return True
    if not torch.compiler.is_compiling():
        backend.note_fallback(call, f"{x.dtype} on {x.device.type}")
    return False
