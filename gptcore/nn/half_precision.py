"""float16 on the CPU: the kernels take f32 and bf16, so f16 is computed in f32 and rounded where it is handed on.

That is what a kernel with f16 inputs and f32 sums gives: each result, and in backward each gradient, is rounded to f16
once, and overflows there. It is no faster than f32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_half(x: Any) -> bool:
    """Whether x is an f16 tensor on the CPU."""
    return isinstance(x, Tensor) and x.dtype == torch.float16 and x.device.type == "cpu"


def in_f32(op: Callable[..., Any], *, rounds: bool = True) -> Callable[..., Any]:
    """``op`` for f16 tensors on the CPU too; calls without one are those of ``op``.

    ``rounds`` false leaves results as ``op`` gives them: losses are f32.
    """

    @functools.wraps(op)
    def call(*arguments: Any, **options: Any) -> Any:
        if not (any(map(is_half, arguments)) or any(map(is_half, options.values()))):
            return op(*arguments, **options)
        wide = {name: x.float() if is_half(x) else x for name, x in options.items()}
        out = op(*(x.float() if is_half(x) else x for x in arguments), **wide)
        if not rounds:
            return out
        return tuple(map(_half, out)) if isinstance(out, tuple) else _half(out)

    return call


def _half(x: Any) -> Any:
    return x.half() if isinstance(x, Tensor) and x.dtype == torch.float32 else x
