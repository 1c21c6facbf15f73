"""Learning from demonstrations: negative log-likelihood of responses, behaviour cloning, PPO-ptx's second term."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gptcore.align.losses.aggregation import aggregate
from gptcore.align.losses.arguments import check_mask, computed, same_shape
from gptcore.align.losses.layout import kept, spread

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gptcore.align.losses.policy_gradient import Aggregation


def nll(
    logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    **how: Unpack[Aggregation],
) -> torch.Tensor:
    """``-log p`` of the demonstrated tokens, nats; also behaviour cloning, whose demonstrations are rollouts.

    Args:
        logprobs: (B, T) or packed, of the tokens that stand there.
        mask: True at response tokens, the one that ends the response among them, or the model never learns to stop.
        weights: (B,) or (S,), how much each demonstration counts; the mean stays one over tokens, so weights of 2
            everywhere double the loss.
        how: "token_mean" unless told otherwise.
    """
    same_shape("nll", logprobs=logprobs, mask=mask)
    check_mask("nll", mask)
    losses = -kept(computed(logprobs), mask)
    if weights is not None:
        losses = losses * spread(weights.to(losses.dtype), losses, how.get("cu_seqlens"))
    return aggregate(losses, mask, **how)


def with_pretraining(policy_loss: torch.Tensor, pretraining_nll: torch.Tensor, gamma: float) -> torch.Tensor:
    """PPO-ptx: ``policy_loss + gamma * pretraining_nll`` (Ouyang et al. 2022, eq. 2, which maximises; their gamma is
    27.8)."""
    if gamma < 0:
        raise ValueError(f"with_pretraining: gamma is {gamma}, expected at least 0")
    return policy_loss + gamma * pretraining_nll
