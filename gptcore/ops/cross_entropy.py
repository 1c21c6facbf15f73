"""Cross-entropy of given logits against classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptcore import backend
from gptcore.ops.arrays import Array, as_array, empty, empty_like, last_contiguous
from gptcore.ops.loss_options import LossOptions, with_defaults
from gptcore.ops.registration import TorchOp

if TYPE_CHECKING:
    from typing import Unpack


class CrossEntropyOptions(LossOptions, total=False):
    """The keyword options of :func:`cross_entropy`, which says what they mean and their defaults."""

    weight: Array | None


def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Array:
    """``torch.nn.functional.cross_entropy`` for class targets.

    Args:
        logits: (N, V), f32 or bf16; torch tensor (differentiable), NumPy or CuPy array.
        targets: (N,) int64 classes below V, or ``ignore_index``.
        weight: (V,) factor of each class, f32 or logits' dtype; it gets no gradient.
        label_smoothing: share of the target's probability spread over all V classes.
        reduction: "mean" over the kept rows, weighted by their targets' weights (NaN if there are none), "sum" or
            "none".

    Returns:
        The loss, () or (N,), in logits' dtype; 0 where the target is ignored. Computed in f32 whatever the dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or targets that do not fit; nothing is written then.
        RuntimeError: on a second derivative.
    """
    loss = _op(logits, targets, weight, ignore_index, label_smoothing, reduction)
    return loss[0] if type(loss) is tuple else loss


def cross_entropy_backward(
    grad_loss: Array, logits: Array, targets: Array, **options: Unpack[CrossEntropyOptions]
) -> Array:
    """Gradient of :func:`cross_entropy` by ``logits`` for callers without autograd.

    Args:
        grad_loss: gradient of the loss, in its shape, f32 or logits' dtype; a number where that is ().
        options: as they were in the forward call.
    """
    weight, *chosen = with_defaults(cross_entropy, options).values()
    _, lse = _run(logits, targets, weight, *chosen)
    return _run_backward(as_array(grad_loss, logits, "float32"), logits, targets, weight, lse, *chosen)


def cross_entropy_reference(logits: Any, targets: Any, **options: Unpack[CrossEntropyOptions]) -> Any:
    """The same in plain torch, any floating dtype, differentiable any number of times."""
    import torch

    weight, ignore_index, smoothing, reduction = with_defaults(cross_entropy, options).values()
    kept = targets != ignore_index
    logprobs = logits - torch.logsumexp(logits, -1, keepdim=True)
    factors = logits.new_ones(logits.shape[-1]) if weight is None else weight
    index = torch.where(kept, targets, 0)
    share = torch.where(kept, factors[index], 0.0)
    picked = torch.where(kept, logprobs.gather(-1, index[:, None])[:, 0], 0.0)
    loss = -(1.0 - smoothing) * share * picked
    if smoothing:
        flat = torch.where(kept, (logprobs * factors).mean(-1), 0.0)
        loss = loss - smoothing * flat
    if reduction == "none":
        return loss
    return loss.sum() / share.sum() if reduction == "mean" else loss.sum()


def _new_loss(logits: Array, reduction: str) -> Array:
    return empty(logits, (logits.shape[0],) if reduction == "none" else ())


def _run(logits: Array, targets: Array, weight: Any, *options: Any) -> tuple[Array, Array]:
    loss, lse = _new_loss(logits, options[-1]), empty(logits, (logits.shape[0],), "float32")
    backend.extension().cross_entropy_forward(last_contiguous(logits), targets, weight, *options, loss, lse)
    return loss, lse


def _loss_alone(logits: Array, targets: Array, weight: Any, *options: Any) -> Array:
    plain = backend.extension().cross_entropy_plain(logits, targets, weight, *options)
    if plain is not None:
        return plain
    loss = _new_loss(logits, options[-1])
    backend.extension().cross_entropy_forward(last_contiguous(logits), targets, weight, *options, loss, None)
    return loss


def _run_backward(
    grad_loss: Any, logits: Array, targets: Array, weight: Any, lse: Array, ignore_index: int,
    smoothing: float, reduction: str,
) -> Array:  # fmt: skip
    dlogits = empty_like(logits)
    backend.extension().cross_entropy_backward(
        grad_loss, last_contiguous(logits), targets, weight, lse, ignore_index, smoothing, reduction, dlogits
    )
    return dlogits


# --- torch ------------------------------------------------------------------------------------------------------


def _fake(logits: Any, targets: Any, weight: Any, *options: Any) -> tuple[Any, Any]:
    return _new_loss(logits, options[-1]), empty(logits, (logits.shape[0],), "float32")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, targets, weight, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, weight, output[1])
    ctx.options = options


def _backward(ctx: Any, grad_loss: Any, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 5
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    return _backward_op(grad_loss, *ctx.saved_tensors, *ctx.options), *nothing


def _backward_fake(grad_loss: Any, logits: Any, *_: Any) -> Any:
    return empty_like(logits)


_backward_op = TorchOp(
    "cross_entropy_backward",
    "(Tensor grad_loss, Tensor logits, Tensor targets, Tensor? weight, Tensor lse, int ignore_index,"
    " float label_smoothing, str reduction) -> Tensor",
    forward=_run_backward,
    fake=_backward_fake,
)
_op = TorchOp(
    "cross_entropy",
    "(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, float label_smoothing, str reduction)"
    " -> (Tensor, Tensor)",
    forward=_run,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    inference=_loss_alone,
    native_hooks=True,
)
