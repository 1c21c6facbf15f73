"""Rows of a table by index, with a deterministic gradient."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, contiguous, empty, rows
from gptcore.ops.registration import TorchOp, refuse_out_with_grad


def embedding(ids: Array, weight: Array, *, out: Array | None = None) -> Array:
    """``out[..., :] = weight[ids[...], :]``.

    The gradient of ``weight`` is dense, in its dtype, each row summed in f32 in the order of the ids,
    whatever the thread count. Where the weight tensor has an attribute ``main_grad`` (V, C), usually f32, the
    gradient is added to that instead, in eager mode, touching only the rows that occur; autograd gets None.

    Args:
        ids: any shape, int32 or int64, each in [0, V); torch tensor, NumPy or CuPy array.
        weight: (V, C), f32 or bf16, of the same framework.
        out: where to write the result; shape (*ids.shape, C), dtype of ``weight``. Not differentiable.

    Returns:
        (*ids.shape, C), dtype of ``weight``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, an index out of range; nothing is
            written then.
    """
    if out is None:
        return _embedding(ids, weight)
    refuse_out_with_grad("embedding", weight)
    return _run(ids, weight, out)


def embedding_backward(
    ids: Array, grad_out: Array, vocabulary: int, *, accumulate_into: Array | None = None
) -> Array:
    """Gradient (V, C) of :func:`embedding` with respect to the weight, of grad_out's dtype.

    Args:
        ids: as given to the forward function; grad_out: (*ids.shape, C), f32 or bf16.
        vocabulary: V.
        accumulate_into: (V, C) f32 or bf16: the gradient is added to it and it is returned.
    """
    accumulate = accumulate_into is not None
    dweight = accumulate_into if accumulate else empty(grad_out, (vocabulary, grad_out.shape[-1]))
    backend.extension().embedding_backward(contiguous(ids), rows(grad_out), dweight, accumulate)
    return dweight


def embedding_reference(ids: Any, weight: Any) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times."""
    return weight[ids.long()]


def _run(ids: Array, weight: Array, out: Array | None = None) -> Array:
    if out is None:
        out = empty(weight, (*ids.shape, weight.shape[-1]))
    backend.extension().embedding_forward(contiguous(ids), weight, out)
    return out


# --- torch -------------------------------------------------------------------------------------------------


def _fake(ids: Any, weight: Any) -> Any:
    return weight.new_empty((*ids.shape, weight.shape[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, weight = inputs
    ctx.save_for_backward(ids)
    ctx.options = weight.shape[0], None  # autocast and tracing pass copies: no main_grad here


def _backward(ctx: Any, grad_out: Any) -> tuple[Any, Any]:
    (ids,) = ctx.saved_tensors
    vocabulary, main_grad = ctx.options
    if main_grad is not None:
        embedding_backward(ids, grad_out, vocabulary, accumulate_into=main_grad)
        return None, None
    return None, _embedding_backward(ids, grad_out, vocabulary)


def _backward_fake(ids: Any, grad_out: Any, vocabulary: int) -> Any:
    return grad_out.new_empty((vocabulary, grad_out.shape[-1]))


_embedding_backward = TorchOp(
    "embedding_backward",
    "(Tensor ids, Tensor grad_out, SymInt vocabulary) -> Tensor",
    forward=embedding_backward,
    fake=_backward_fake,
)
_embedding = TorchOp(
    "embedding",
    "(Tensor ids, Tensor weight) -> Tensor",
    forward=_run,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    native_hooks=True,
)
