"""The critic's loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from gptcore.align.losses.advantages import moments
from gptcore.align.losses.aggregation import aggregate, masked_mean
from gptcore.align.losses.arguments import check_mask, check_range, computed, same_shape
from gptcore.align.losses.layout import kept
from gptcore.align.losses.policy_gradient import Aggregation

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ValueLoss(NamedTuple):
    """The loss, and 0-d detached: the share of tokens where the clipped side was taken; the share of the returns'
    variance that the values explain, ``1 - var(returns - values) / var(returns)``, 0 where returns are constant."""

    loss: torch.Tensor
    clip_share: torch.Tensor
    explained_variance: torch.Tensor


def value_loss(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_values: torch.Tensor | None = None,
    clip: float | None = 0.2,
    **how: Unpack[Aggregation],
) -> ValueLoss:
    """``max((V - R)^2, (V_clipped - R)^2) / 2`` with V kept within ``clip`` of ``old_values`` (as in PPO's code).

    Args:
        values: (B, T) or packed, with the gradient.
        returns: advantages plus old values, in the same shape.
        old_values: the critic's when the batch was sampled; None, or ``clip=None``, is the plain squared error.
        how: "token_mean" unless told otherwise.
    """
    same_shape("value_loss", values=values, returns=returns, mask=mask, old_values=old_values)
    check_mask("value_loss", mask)
    values, returns = kept(computed(values), mask), kept(computed(returns.detach()), mask)
    errors = (values - returns).square()
    share = torch.zeros((), device=values.device)
    if old_values is not None and clip is not None:
        check_range("value_loss", "clip", clip, 0.0, float("inf"))
        old = kept(computed(old_values.detach()), mask)
        clipped_errors = (old + (values - old).clamp(-clip, clip) - returns).square()
        share = masked_mean((clipped_errors > errors).float(), mask)
        errors = torch.maximum(errors, clipped_errors)
    with torch.no_grad():
        spread_of_returns = moments(returns, mask).variance
        left = moments(returns - values, mask).variance
        explained = torch.where(spread_of_returns > 0, 1 - left / spread_of_returns.clamp(min=1e-30), 0.0)
    return ValueLoss(0.5 * aggregate(errors, mask, **how), share, explained)
