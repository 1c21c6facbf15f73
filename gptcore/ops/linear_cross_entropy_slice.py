"""The part of linear_cross_entropy that a slice of the vocabulary has, for classes spread over processes."""

from __future__ import annotations

from typing import Any, NamedTuple

from gptcore import backend
from gptcore.ops.arrays import Array, as_rows, empty, last_contiguous

IGNORED = -100


class SliceLoss(NamedTuple):
    """What one slice adds, (N,) f32 each; 0 where the target is ignored.

    loss: over all slices the sum is each token's loss without its log-sum-exp. target_logit: the target's logit, or 0
    where it is in another slice. lse: log-sum-exp of the slice's logits.
    """

    loss: Any
    target_logit: Any
    lse: Any


def linear_cross_entropy_slice(
    x: Array,
    weight: Array,
    targets: Array,
    first_class: int,
    num_classes: int,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    bias: Array | None = None,
    logit_soft_cap: float | None = None,
) -> SliceLoss:
    """One slice's part of :func:`gptcore.ops.linear_cross_entropy`, by the same kernel; not differentiable.

    Args:
        x: (N, C), f32 or bf16.
        weight: (V, C), classes first_class to first_class + V - 1 of ``num_classes``. bias: (V,), theirs.
        targets: (N,) int64 among all classes, or -100, which is ignored.
        label_smoothing, logit_scale, logit_soft_cap: as for the whole; smoothing spreads over all classes.

    Raises:
        ValueError, TypeError: shapes, dtypes or targets that do not fit, a slice beyond ``num_classes``.

    Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
    """
    rows = as_rows(x)
    loss, z, target_logit, lse = (empty(rows, (rows.shape[0],), "float32") for _ in range(4))
    backend.extension().linear_cross_entropy_forward(
        last_contiguous(rows), last_contiguous(weight), targets, IGNORED, label_smoothing, 0.0, logit_scale, "none",
        loss, z, target_logit, lse, bias=last_contiguous(bias), logit_soft_cap=logit_soft_cap,
        first_class=first_class, num_classes=num_classes,
    )  # fmt: skip
    return SliceLoss(loss, target_logit, lse)


def linear_cross_entropy_slice_backward(
    grad_loss: Array | None,
    grad_z: Array | None,
    x: Array,
    weight: Array,
    targets: Array,
    lse: Array,
    first_class: int,
    num_classes: int,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    bias: Array | None = None,
    logit_soft_cap: float | None = None,
    main_grad: Array | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients ``(dx, dweight, dbias)`` of the whole loss; dx is the slice's part, which adds up over slices.

    Args:
        grad_loss, grad_z: (N,) f32, of each token's loss and of ``z_loss * lse**2``; None counts as zero.
        lse: (N,) f32, over all classes.
        main_grad: (V, C) f32 to add weight's gradient to; dweight is then None.
        wanted: of the three; that of a bias of None is None. The others as for the forward call.
    """
    rows = as_rows(x)
    dx = empty(rows, rows.shape) if wanted[0] else None
    dweight = main_grad if main_grad is not None or not wanted[1] else empty(weight, weight.shape)
    dbias = empty(bias, bias.shape) if wanted[2] and bias is not None else None
    backend.extension().linear_cross_entropy_backward(
        grad_loss, grad_z, last_contiguous(rows), last_contiguous(weight), targets, lse, IGNORED, label_smoothing,
        z_loss, logit_scale, "none", dx, dweight if wanted[1] else None, main_grad is not None,
        bias=last_contiguous(bias), logit_soft_cap=logit_soft_cap, dbias=dbias, first_class=first_class,
        num_classes=num_classes,
    )  # fmt: skip
    return dx, None if main_grad is not None or not wanted[1] else dweight, dbias
