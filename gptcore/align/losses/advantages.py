"""Rewards to advantages: discounting, generalised advantage estimation, whitening, group baselines.

Nothing here is differentiated: results are data for the losses. Sequences are padded rows or packed (``layout.py``).
A place outside the mask is no step of the decision process: whatever stands there is skipped, so padding on either
side, what follows the end, and a tool's answer between two response tokens change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gptcore.align.losses.arguments import check_finite, check_mask, check_range, computed, same_shape
from gptcore.align.losses.layout import (
    check_cu_seqlens,
    kept,
    last_kept,
    next_kept,
    sequence_ends,
    sequence_sum,
    spread,
)


class Estimates(NamedTuple):
    """Advantages and the returns that the critic learns, both in the rewards' shape, 0 outside the mask."""

    advantages: torch.Tensor
    returns: torch.Tensor


@torch.no_grad()
def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Estimates:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), and ``returns = advantages + values``.

    ``A_t = delta_t + gamma lam A_t+1`` with ``delta_t = r_t + gamma V_t+1 - V_t``, where t + 1 is the next response
    token of the same sequence. After the last one the value is 0, or ``bootstrap``.

    Args:
        rewards: (B, T) or packed; ``rewards[t]`` follows token t.
        values: of the state in which token t was chosen, the critic's at token t - 1.
        mask: bool, True at response tokens.
        gamma: discount, in [0, 1].
        lam: in [0, 1]: 1 is reward-to-go minus value, 0 is the error of one step.
        bootstrap: (B,) or (S,) values of the states after the last tokens, for sequences that were cut off rather than
            finished.
        cu_seqlens: (S + 1) int32 of packed sequences.
    """
    _check_steps("gae", rewards, mask, cu_seqlens, values=values)
    check_range("gae", "gamma", gamma, 0.0, 1.0)
    check_range("gae", "lam", lam, 0.0, 1.0)
    rewards, values = kept(computed(rewards), mask), kept(computed(values), mask)
    following = next_kept(mask, cu_seqlens)
    next_values = values.gather(-1, following.clamp(min=0))
    after = torch.zeros_like(values)
    if bootstrap is not None:
        after = spread(computed(bootstrap), values, cu_seqlens)
    next_values = torch.where(following >= 0, next_values, after)
    deltas = kept(rewards + gamma * next_values - values, mask)
    advantages = kept(_scan(deltas, mask, gamma * lam, cu_seqlens), mask)
    return Estimates(advantages, kept(advantages + values, mask))


@torch.no_grad()
def discounted(
    rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, *, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Reward-to-go ``G_t = r_t + gamma G_t+1`` over response tokens, 0 outside the mask; shapes as in :func:`gae`."""
    _check_steps("discounted", rewards, mask, cu_seqlens)
    check_range("discounted", "gamma", gamma, 0.0, 1.0)
    return kept(_scan(kept(computed(rewards), mask), mask, gamma, cu_seqlens), mask)


@torch.no_grad()
def token_rewards(
    scores: torch.Tensor,
    kl: torch.Tensor,
    mask: torch.Tensor,
    beta: float,
    *,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """``-beta kl`` at every response token, plus the sequence's score at its last one (Ouyang et al. 2022, eq. 2).

    Args:
        scores: (B,) or (S,), a reward for each sequence.
        kl: (B, T) or packed, nats per token, such as ``kl.k1(logprobs, ref_logprobs)``.

    Raises:
        ValueError: a sequence without a response token, which has no place for its score.
        UserError: a score that is NaN or infinite.
    """
    _check_steps("token_rewards", kl, mask, cu_seqlens)
    check_finite("token_rewards", "scores", scores)
    ends = last_kept(mask, cu_seqlens)
    missing = (sequence_sum(ends.float(), cu_seqlens) == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"token_rewards: sequences {missing[:8]} have no response token to carry their score"
        )
    penalties = -beta * kept(computed(kl), mask)
    carried = spread(computed(scores), penalties, cu_seqlens)
    return penalties + kept(carried, ends)


@torch.no_grad()
def without_end(
    scores: torch.Tensor, ended: torch.Tensor, penalty: float, *, replace: bool = False
) -> torch.Tensor:
    """Scores (B,) less ``penalty`` where a response has no end token (``ended`` (B,) bool is False).

    ``replace``: the score becomes ``-penalty`` instead, so that nothing the model wrote can make up for it (Huang et
    al. 2024, "The N+ implementation details of RLHF with PPO").
    """
    same_shape("without_end", scores=scores, ended=ended)
    check_mask("without_end", ended, "ended")
    worse = torch.full_like(scores, -penalty) if replace else scores - penalty
    return torch.where(ended, scores, worse)


class Moments(NamedTuple):
    """Mean and variance (Bessel's correction) of the masked values, and how many there were; 0-d tensors."""

    mean: torch.Tensor
    variance: torch.Tensor
    number: torch.Tensor


@torch.no_grad()
def moments(values: torch.Tensor, mask: torch.Tensor) -> Moments:
    """Of the values under the mask, in two passes; the variance of a single value is 0."""
    same_shape("moments", values=values, mask=mask)
    check_mask("moments", mask)
    count = mask.sum()
    values = kept(computed(values), mask)
    mean = values.sum() / count.clamp(min=1)
    squares = kept((values - mean).square(), mask).sum()
    return Moments(mean, squares / (count - 1).clamp(min=1), count)


@torch.no_grad()
def pooled(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together, micro-batches or ranks, from each part's own (Chan et al. 1979)."""
    numbers = torch.stack([part.number for part in parts]).to(parts[0].mean.dtype)
    means = torch.stack([part.mean for part in parts])
    variances = torch.stack([part.variance for part in parts])
    count = numbers.sum()
    mean = (numbers * means).sum() / count.clamp(min=1)
    squares = ((numbers - 1).clamp(min=0) * variances + numbers * (means - mean).square()).sum()
    return Moments(mean, squares / (count - 1).clamp(min=1), count)


@torch.no_grad()
def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    shift_mean: bool = True,
    of: Moments | None = None,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """Values scaled to variance 1, and with ``shift_mean`` to mean 0; 0 outside the mask.

    PPO whitens advantages with the mean shifted, and rewards without, which keeps their sign (Huang et al. 2024).
    Constant values stay finite: ``epsilon`` is added to the variance.

    Args:
        of: moments to whiten by, of a whole update where ``values`` is one micro-batch of it; None: their own.
    """
    own = moments(values, mask) if of is None else of
    values = computed(values)
    white = (values - own.mean) * (own.variance + epsilon).rsqrt()
    return kept(white if shift_mean else white + own.mean, mask)


@torch.no_grad()
def rloo(rewards: torch.Tensor) -> torch.Tensor:
    """Leave-one-out advantages of K samples a prompt, (P, K): each reward less the mean of the others'.

    Kool et al. 2019; Ahmadian et al. 2024, eq. 8. Computed as ``K / (K - 1)`` times the distance from
    the group's mean, which loses fewer digits than the others' sum.
    """
    _check_groups("rloo", rewards)
    rewards = computed(rewards)
    k = rewards.shape[1]
    return (rewards - rewards.mean(-1, keepdim=True)) * (k / (k - 1))


@torch.no_grad()
def group_relative(rewards: torch.Tensor, *, scale: bool = True, epsilon: float = 0.0) -> torch.Tensor:
    """GRPO's advantages of K samples a prompt, (P, K): distance from the group's mean, in its standard deviations.

    Shao et al. 2024 (DeepSeekMath), section 4.1.2, with Bessel's correction. ``scale=False`` is Dr. GRPO's (Liu et al.
    2025), without the division, which weighs prompts by how little their rewards vary. A group whose rewards are equal,
    up to rounding, has advantages 0; other trainers add ``epsilon`` (1e-4, 1e-6) to the deviation instead.

    The mean holds the sample itself, so unscaled advantages are ``(K - 1) / K`` of :func:`rloo`'s, and a KL penalty
    acts as if its coefficient were ``K / (K - 1)`` times larger.
    """
    _check_groups("group_relative", rewards)
    rewards = computed(rewards)
    centred = rewards - rewards.mean(-1, keepdim=True)
    if not scale:
        return centred
    std = rewards.std(-1, keepdim=True)
    noise = 8 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(-1, keepdim=True)
    return torch.where(std > noise, centred / (std + epsilon), 0.0)


@torch.no_grad()
def less_mean(rewards: torch.Tensor) -> torch.Tensor:
    """REINFORCE with the batch's mean as baseline: (B,) to (B,)."""
    check_finite("less_mean", "rewards", rewards)
    rewards = computed(rewards)
    return rewards - rewards.mean()


def _check_groups(function: str, rewards: torch.Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"{function}: rewards has shape {tuple(rewards.shape)}, expected (prompts, samples) with at least 2 samples"
        )
    check_finite(function, "rewards", rewards)


def _check_steps(
    function: str,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    **more: torch.Tensor,
) -> None:
    same_shape(function, mask=mask, rewards=rewards, **more)
    check_mask(function, mask)
    if cu_seqlens is not None:
        check_cu_seqlens(function, mask, cu_seqlens)
    elif mask.dim() != 2:
        raise ValueError(
            f"{function}: mask has shape {tuple(mask.shape)}, expected (B, T), or packed with cu_seqlens"
        )


def _scan(
    increments: torch.Tensor, mask: torch.Tensor, decay: float, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """``x_t = increment_t + decay x_t+1`` from the right, through places outside the mask without decay.

    By doubling: after pass d each place holds its sum over 2^d places, so a row of T takes log2 T passes over whole
    tensors instead of T over columns, and packed sequences none more than their longest.
    """
    total = increments
    # what a place takes over from its right neighbour; nothing across the end of a sequence
    factor = torch.where(mask, total.new_tensor(decay), total.new_tensor(1.0))
    factor = kept(factor, ~sequence_ends(mask, cu_seqlens))
    reach, length = 1, mask.shape[-1]
    while reach < length and bool(factor.any()):
        zeros = torch.zeros_like(total[..., :reach])
        total = total + factor * torch.cat([total[..., reach:], zeros], -1)
        factor = factor * torch.cat([factor[..., reach:], zeros], -1)
        reach *= 2
    return total
