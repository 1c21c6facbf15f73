"""float16: the kernels take f32 and bf16, so f16 is computed in f32 and rounded where it is handed on.

That is what a kernel with f16 inputs and f32 sums gives: each result, and in backward each gradient, is rounded to f16
once, and overflows there. It is no faster than f32. On CUDA attention takes f16 itself, and products are torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptcore import backend


def is_half(x: Any) -> bool:
    """Whether x is an f16 tensor on a device with kernels."""
    return isinstance(x, Tensor) and x.dtype == torch.float16 and backend.has_kernels(x.device)


def in_f32(op: Callable[..., Any], *, rounds: bool = True, kernel: str | None = None) -> Callable[..., Any]:
    """``op`` for f16 tensors too; calls without one are those of ``op``.

    ``rounds`` false leaves results as ``op`` gives them: losses are f32. ``kernel``: by whose name a device is asked
    whether it takes f16 itself, where some do.
    """

    def is_ours(x: Any) -> bool:
        return is_half(x) and (
            kernel is None or x.device.type == "cpu" or not backend.has_kernels(x.device, kernel)
        )

    @functools.wraps(op)
    def call(*arguments: Any, **options: Any) -> Any:
        if not (any(map(is_ours, arguments)) or any(map(is_ours, options.values()))):
            return op(*arguments, **options)
        wide = {name: x.float() if is_half(x) else x for name, x in options.items()}
        out = op(*(x.float() if is_half(x) else x for x in arguments), **wide)
        if not rounds:
            return out
        return tuple(map(_half, out)) if isinstance(out, tuple) else _half(out)

    return call


def _half(x: Any) -> Any:
    return x.half() if isinstance(x, Tensor) and x.dtype == torch.float32 else x
