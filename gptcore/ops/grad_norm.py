"""The global norm of a model's gradients, with the check for infinities and NaN, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty, is_torch, on_device

Number = float | Array
"""A number, or an array of one element (f32, f64 or int64). Kernels alone read one in a GPU's memory."""

Results = tuple[Any, Any]
"""``(norm, found_inf)``: numbers, or arrays of one element each, f64 and bool, which nobody has waited for."""


def grad_norm(grads: Sequence[Array], grad_scale: Number = 1.0, *, out: Results | None = None) -> Results:
    """Euclidean norm of all tensors together, over ``grad_scale``, and whether an element is inf or NaN.

    The same bits for every thread count, and in the optimizers' ops, which begin with it: a caller who
    updates groups of parameters with different settings takes the norm of all of them first and hands it
    to each call. Not differentiable.

    Args:
        grads: f32 or bf16, contiguous, any shapes; torch tensors, NumPy or CuPy arrays.
        grad_scale: above 0; the norm is divided by it (a loss scale, or the number of micro-batches).
        out: two arrays of one element, f64 and bool, beside the gradients: overwritten with the result and returned
            in place of numbers. Gradients on a GPU have new ones made.

    Returns:
        ``(norm, found_inf)``; the norm is inf or NaN where an element is.

    Raises:
        ValueError, TypeError: tensors or a scale that do not fit.

    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks",
    section 3.2.
    """
    out = results_for(grads, out)
    result = backend.extension().grad_norm(grads, grad_scale, *(out or (None, None)))
    return result if out is None else out


def results_for(grads: Sequence[Array], out: Results | None) -> Results | None:
    """Where an update's norm and check are written: ``out``, or where gradients lie on a GPU new arrays there; None:
    they are numbers."""
    if out is not None or not grads or not on_device(grads[0]):
        return out
    like = grads[0]
    return empty(like, (), "float64"), empty(like, (), "bool" if is_torch(like) else bool)


def square_sums(
    grads: Sequence[Array], block: int = 1024, grad_scale: Number = 1.0, *, out: Array | None = None
) -> tuple[Array, Any]:
    """Sums of squares of each block of ``block`` elements, and whether an element is inf or NaN.

    What :func:`grad_norm` is made of where gradients are cut into slices with several owners: a block's bits depend on
    its elements alone, so that slices that begin at multiples of ``block`` have the sums of the whole tensor, and sums
    of all blocks added up in order give a norm that does not know the cut. Not differentiable.

    Args:
        grads: f32 or bf16, contiguous, any shapes; torch tensors, NumPy or CuPy arrays. A block is neighbours in
            memory; a tensor's last one may be shorter, and a tensor of no elements has none.
        block: elements of a block, 1 or more.
        grad_scale: above 0; gradients are divided by it.
        out: f64 of shape (blocks,), overwritten; default: a new one of the first gradient's framework, and a NumPy
            array where there are no gradients.

    Returns:
        ``(sums, found_inf)``: f64 of shape (blocks,), of all tensors in order; a sum is inf or NaN where an element
        of its block is. found_inf of gradients on a GPU is an array there, of one bool.

    Raises:
        ValueError, TypeError: tensors, a block, a scale or an ``out`` that do not fit; nothing is written then.
    """
    extension = backend.extension()
    if out is None:
        blocks = extension.square_blocks(grads, block)
        if grads:
            out = empty(grads[0], (blocks,), "float64")
        else:
            import numpy

            out = numpy.empty(0)
    results = results_for(grads, None)
    found_inf = extension.square_sums(grads, block, grad_scale, out, results and results[1])
    return out, found_inf if results is None else results[1]


def grad_norm_reference(grads: Sequence[Any], grad_scale: float = 1.0) -> tuple[float, bool]:
    """The same in plain torch, squares in float64."""
    norm = math.sqrt(math.fsum(g.double().square().sum().item() for g in grads)) / grad_scale
    return norm, not all(g.isfinite().all().item() for g in grads)


def square_sums_reference(
    grads: Sequence[Any], block: int = 1024, grad_scale: float = 1.0
) -> tuple[Any, bool]:
    """The same in plain torch, squares in float64."""
    import torch

    blocks = [b for g in grads for b in g.double().reshape(-1).split(block) if len(b)]
    sums = [b.div(grad_scale).square().sum() for b in blocks]
    found_inf = not all(g.isfinite().all().item() for g in grads)
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.float64), found_inf


def clip_factor(norm: float | None, max_norm: float | None, grad_scale: float) -> float:
    """What optimizers multiply gradients by: the clip to ``max_norm``, if any, over ``grad_scale``."""
    clip = 1.0 if max_norm is None or norm is None else min(1.0, max_norm / (norm + 1e-6))
    return clip / grad_scale


def per_parameter(value: Any, count: int) -> Any:
    """A setting that is one for all or one per parameter, as the latter."""
    return [value] * count if isinstance(value, (bool, int, float)) else value
