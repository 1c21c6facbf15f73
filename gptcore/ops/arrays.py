"""Allocation in the caller's framework: torch, NumPy (bf16 by ml_dtypes) or CuPy arrays in, the same kind out."""

from __future__ import annotations

import sys
from typing import Any

Array = Any
"""A torch.Tensor, numpy.ndarray or cupy.ndarray."""


def is_torch(x: Array) -> bool:
    """Whether ``x`` is a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def namespace(x: Array) -> Any:
    """The module whose arrays ``x`` is one of: torch, numpy or cupy."""
    if is_torch(x):
        return sys.modules["torch"]
    if type(x).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"]
    import numpy

    return numpy


def empty(like: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """An uninitialised array of ``like``'s framework and device.

    Args:
        dtype: one of that framework's, or ``"float32"`` / ``"int32"``, which all have; default ``like.dtype``.
    """
    module = namespace(like)
    if isinstance(dtype, str):
        dtype = getattr(module, dtype)
    if module.__name__ == "torch":
        return like.new_empty(shape, dtype=dtype)
    return module.empty(shape, dtype=like.dtype if dtype is None else dtype)


def empty_like(x: Array) -> Array:
    """An uninitialised, contiguous array of x's framework, device, shape and dtype."""
    module = namespace(x)
    if module.__name__ != "torch":
        return module.empty_like(x)
    if x.layout is not module.strided:
        raise TypeError(f"gptcore: got a {x.layout} tensor, expected a dense one")
    return module.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def as_rows(x: Array) -> Array:
    """``x`` of shape (..., C) as a matrix (N, C): a view where the strides allow it, else a copy. None stays None."""
    return x if x is None or x.ndim == 2 else x.reshape(-1, x.shape[-1])


def last_contiguous(x: Array) -> Array:
    """``x`` itself if its last dimension has stride 1, else a contiguous copy. None stays None."""
    if x is None or x.shape[-1] <= 1:
        return x
    if is_torch(x):
        return x if x.stride(-1) == 1 else x.contiguous()
    return x if x.strides[-1] == x.itemsize else namespace(x).ascontiguousarray(x)
