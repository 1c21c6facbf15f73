"""transformers' ``apply_rotary_pos_emb`` over ``ops.rotary``: a family's module holds it, so it is patched there."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torch import Tensor

from gptcore import ops
from gptcore.nn.support import served

_NAME = "apply_rotary_pos_emb"


def patch(modeling: ModuleType, *, interleaved: bool) -> None:
    """Replace the module's function by one that takes CPU tensors in f32 and bf16 to the kernel. Doing it twice
    changes nothing; :func:`unpatch` undoes it."""
    theirs = getattr(modeling, _NAME)
    if hasattr(theirs, "gptcore_original"):
        return

    @functools.wraps(theirs)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        return turn_both(theirs, q, k, cos, sin, unsqueeze_dim, interleaved=interleaved)

    apply_rotary_pos_emb.gptcore_original = theirs  # type: ignore[attr-defined]
    setattr(modeling, _NAME, apply_rotary_pos_emb)


def unpatch(modeling: ModuleType) -> None:
    """Give the module its own function back."""
    theirs: Any = getattr(getattr(modeling, _NAME), "gptcore_original", None)
    if theirs is not None:
        setattr(modeling, _NAME, theirs)


def _taken(q: Tensor, k: Tensor, cos: Tensor, unsqueeze_dim: int) -> bool:
    return (
        unsqueeze_dim == 1
        and q.ndim == k.ndim == 4
        and cos.ndim == 3
        and cos.shape[0] in (1, q.shape[0])
        and q.dtype == k.dtype
        and served("rotary", q, k)
        and not cos.requires_grad
    )


def turn_both(
    theirs: Any,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``theirs(q, k, cos, sin, unsqueeze_dim)`` by the kernel where that takes it."""
    if not _taken(q, k, cos, unsqueeze_dim):
        result: tuple[Tensor, Tensor] = theirs(q, k, cos, sin, unsqueeze_dim)
        return result
    half = cos.shape[-1] // 2
    c, s = (x[..., :half].float().reshape(-1, half).contiguous() for x in (cos, sin))
    turned_q, turned_k = (turn(x.transpose(1, 2), c, s, interleaved=interleaved) for x in (q, k))
    return turned_q.transpose(1, 2), turned_k.transpose(1, 2)


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """x (B, T, H, D) by tables of T rows, or of B * T, one for each token."""
    if cos.shape[0] == x.shape[1]:
        return ops.rotary(x, cos, sin, interleaved=interleaved)
    return ops.rotary(x.flatten(0, 1), cos, sin, interleaved=interleaved).unflatten(0, x.shape[:2])
