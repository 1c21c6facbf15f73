"""Losses of the policy from sampled tokens: REINFORCE, the importance-weighted surrogate, PPO's clip, GRPO.

Shapes: (B, T), or packed with ``cu_seqlens``. ``logprobs`` are the trained policy's and carry the gradient;
``old_logprobs`` those of the policy that sampled, of the distribution sampled from (after temperature and truncation).
Advantages come per token, or per sequence ((B,) or (S,)) and are spread over its tokens. All are minimised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from gptcore.align.losses import kl as divergence
from gptcore.align.losses.aggregation import aggregate, masked_mean
from gptcore.align.losses.arguments import check_mask, check_range, computed, same_shape
from gptcore.align.losses.layout import counts, kept, sequence_sum, spread
from gptcore.errors import unknown_name

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Aggregation(TypedDict, total=False):
    """How tokens become one number; see :func:`gptcore.align.losses.aggregation.token_weights`."""

    aggregation: str
    cu_seqlens: torch.Tensor | None
    total: float | None
    length: int | None


class PolicyLoss(NamedTuple):
    """The loss, and what a run should watch: means over this call's response tokens, 0-d and detached.

    clip_share: tokens whose clipped side was taken, so that they give no gradient.
    ratio: of new to old probabilities; 1 before the first update.
    approx_kl: k3 of the old policy from the new; 0 before the first update.
    kl: what the penalty measured, 0 without one.
    """

    loss: torch.Tensor
    clip_share: torch.Tensor
    ratio: torch.Tensor
    approx_kl: torch.Tensor
    kl: torch.Tensor


def reinforce(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **how: Unpack[Aggregation]
) -> torch.Tensor:
    """``-A log p`` (Williams 1992), summed over a sequence's tokens and averaged over sequences unless told otherwise.

    With :func:`~gptcore.align.losses.advantages.rloo` for advantages this is RLOO.
    """
    advantages = _prepared("reinforce", logprobs, advantages, mask, how.get("cu_seqlens"))
    how.setdefault("aggregation", "reinforce")
    return aggregate(-advantages * kept(computed(logprobs), mask), mask, **how)


def surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    **how: Unpack[Aggregation],
) -> torch.Tensor:
    """``-ratio A``: L^CPI, what TRPO minimises inside its trust region (Schulman et al. 2015, eq. 14)."""
    advantages = _prepared("surrogate", logprobs, advantages, mask, how.get("cu_seqlens"))
    ratio = _log_ratio(logprobs, old_logprobs, mask).exp()
    return aggregate(-advantages * ratio, mask, **how)


def ppo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    level: str = "token",
    **how: Unpack[Aggregation],
) -> PolicyLoss:
    """``max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))`` (Schulman et al. 2017, eq. 7).

    Args:
        clip_high: another bound upwards (DAPO's "clip higher"); None: ``clip``.
        dual_clip: at least 1: where A is negative, the loss is at most ``-dual_clip A`` (Ye et al. 2020).
        level: "token": a ratio for each token. "sequence": the geometric mean of a sequence's ratios, for all its
            tokens (GSPO, Zheng et al. 2025, eq. 7), a mean of the log-ratios and not their sum.
        how: "token_mean" unless told otherwise.
    """
    advantages = _prepared("ppo", logprobs, advantages, mask, how.get("cu_seqlens"))
    check_range("ppo", "clip", clip, 0.0, float("inf"))
    high = clip if clip_high is None else clip_high
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    approx_kl = divergence.k3(log_ratio.detach().neg(), torch.zeros_like(log_ratio))
    if level == "sequence":
        log_ratio = kept(_sequence_mean(log_ratio, mask, how.get("cu_seqlens")), mask)
    elif level != "token":
        raise unknown_name("level", level, ("token", "sequence"))
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + high)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        check_range("ppo", "dual_clip", dual_clip, 1.0, float("inf"))
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    with torch.no_grad():
        share = masked_mean((clipped > plain).float(), mask)
        mean_ratio, mean_kl = masked_mean(ratio, mask), masked_mean(approx_kl, mask)
    return PolicyLoss(aggregate(losses, mask, **how), share, mean_ratio, mean_kl, torch.zeros_like(mean_kl))


def grpo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl: torch.Tensor | None = None,
    beta: float = 0.0,
    clip: float = 0.2,
    clip_high: float | None = None,
    level: str = "token",
    **how: Unpack[Aggregation],
) -> PolicyLoss:
    """PPO's clip on group advantages plus ``beta kl`` per token (Shao et al. 2024, eq. 3).

    Args:
        advantages: of :func:`~gptcore.align.losses.advantages.group_relative`, flattened to one for each sequence.
        kl: (B, T) or packed with its gradient: ``kl.k3(logprobs, ref_logprobs, mask)`` as published, whose gradient is
            that of KL(ref || p); ``kl.k2`` or ``kl.exact``, with the gradient of KL(p || ref).
        how: "grpo" (mean over each sequence, then over sequences) unless told otherwise; "dapo", "dr_grpo".
    """
    how.setdefault("aggregation", "grpo")
    policy = ppo(logprobs, old_logprobs, advantages, mask, clip=clip, clip_high=clip_high, level=level, **how)
    if kl is None or not beta:
        if beta:
            raise ValueError(f"grpo: beta is {beta} and there is no kl to weigh with it")
        return policy
    same_shape("grpo", logprobs=logprobs, kl=kl)
    penalty = aggregate(kl, mask, **how)
    return policy._replace(loss=policy.loss + beta * penalty, kl=masked_mean(kl.detach(), mask))


def entropy_bonus(entropy: torch.Tensor, mask: torch.Tensor, **how: Unpack[Aggregation]) -> torch.Tensor:
    """The mean entropy (nats) over response tokens alone; subtract it, times a coefficient, from the loss."""
    return aggregate(entropy, mask, **how)


def _prepared(
    function: str,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """Advantages per token, 0 outside the mask, without a gradient."""
    same_shape(function, logprobs=logprobs, mask=mask)
    check_mask(function, mask)
    advantages = computed(advantages.detach())
    sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if advantages.shape != mask.shape:
        if tuple(advantages.shape) != (sequences,):
            raise ValueError(
                f"{function}: advantages has shape {tuple(advantages.shape)}, "
                f"expected {tuple(mask.shape)} or one for each sequence, ({sequences},)"
            )
        advantages = spread(advantages, mask, cu_seqlens)
    return kept(advantages, mask)


def _log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    same_shape("log_ratio", logprobs=logprobs, old_logprobs=old_logprobs)
    return kept(computed(logprobs), mask) - kept(computed(old_logprobs.detach()), mask)


def _sequence_mean(values: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    mean = sequence_sum(values, cu_seqlens) / counts(mask, cu_seqlens).clamp(min=1)
    return spread(mean, values, cu_seqlens)
