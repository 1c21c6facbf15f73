"""Allocation in the caller's framework: torch, NumPy (bf16 by ml_dtypes) or CuPy in, the same kind out."""

from __future__ import annotations

import sys
from typing import Any

Array = Any
"""A torch.Tensor, numpy.ndarray or cupy.ndarray."""


def is_torch(x: Array) -> bool:
    """Whether ``x`` is a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def on_device(x: Array) -> bool:
    """Whether ``x`` lies in a GPU's memory, so that looking at its elements would wait for it."""
    return x.is_cuda if is_torch(x) else type(x).__module__.partition(".")[0] == "cupy"


def namespace(x: Array) -> Any:
    """The module whose arrays ``x`` is one of: torch, numpy or cupy.

    Raises:
        TypeError: it is of none.
    """
    if is_torch(x):
        return sys.modules["torch"]
    if type(x).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"]
    import numpy

    if not isinstance(x, numpy.ndarray):
        raise TypeError(f"gptcore: got {type(x).__name__}, expected a torch tensor, a NumPy or CuPy array")
    return numpy


def empty(like: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """An uninitialised array of ``like``'s framework and device.

    Args:
        dtype: one of that framework's, or ``"float32"``, ``"float64"``, ``"int32"`` or ``"int64"``, which all have;
            default: like's.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        # Sizes one by one parse in half the time of a tuple.
        sizes = shape or ((),)
        if dtype is None:
            return like.new_empty(*sizes)
        return like.new_empty(*sizes, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    module = namespace(like)
    if isinstance(dtype, str):
        dtype = getattr(module, dtype)
    if dtype is None:
        dtype = like.dtype
    if module.__name__ != "cupy":
        return module.empty(shape, dtype)
    with like.device:  # CuPy allocates on the current one
        return module.empty(shape, dtype)


def as_array(value: Any, like: Array, dtype: Any = None) -> Any:
    """``value`` itself if it is an array or None; a number, as NumPy makes of () arrays, as an array like ``like``.

    Args:
        dtype: as for :func:`empty`.
    """
    if value is None or hasattr(value, "__dlpack__"):
        return value
    array = empty(like, (), dtype)
    array[...] = float(value)
    return array


def empty_like(x: Array) -> Array:
    """An uninitialised, contiguous array of x's framework, device, shape and dtype."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return empty(x, getattr(x, "shape", ()))  # NumPy's own would keep gaps and order of x
    if x.layout is not torch.strided:
        raise TypeError(f"gptcore: got a {x.layout} tensor, expected a dense one")
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def as_rows(x: Array) -> Array:
    """``x`` of shape (..., C) as a matrix (N, C): a view where the strides allow it, else a copy."""
    return x if x is None or x.ndim == 2 else x.reshape(-1, x.shape[-1])


def contiguous(x: Array) -> Array:
    """``x`` itself if it has no gaps and is row-major, else a copy that is. None stays None."""
    if x is None:
        return None
    return x.contiguous() if is_torch(x) else namespace(x).ascontiguousarray(x)


def last_contiguous(x: Array) -> Array:
    """``x`` itself if its last dimension has stride 1, else a contiguous copy. None stays None."""
    if x is None or x.shape[-1] <= 1:
        return x
    if is_torch(x):
        return x if x.stride(-1) == 1 else x.contiguous()
    return x if x.strides[-1] == x.itemsize else namespace(x).ascontiguousarray(x)


def rows(x: Array) -> Array:
    """``x`` (..., C) itself if its rows lie at one stride, so that kernels take it as (N, C); else a copy.

    A contiguous array qualifies, and so does a slice of a fused projection's last dimension. None stays None.
    """
    if x is None:
        return None
    if is_torch(x):
        if x.is_contiguous() or _rows_at_one_stride(x.shape, x.stride()):
            return x
        return x.contiguous()
    if x.flags.c_contiguous or _rows_at_one_stride(x.shape, tuple(s / x.itemsize for s in x.strides)):
        return x
    return namespace(x).ascontiguousarray(x)


def _rows_at_one_stride(shape: tuple[int, ...], strides: tuple[float, ...]) -> bool:
    if not shape or (shape[-1] > 1 and strides[-1] != 1):
        return False
    expected = None
    for size, stride in zip(shape[-2::-1], strides[-2::-1], strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return False
        expected = stride * size
    return True
