"""Losses of a reward model: pairs, and rankings of K answers with all their pairs at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptcore.align.losses.aggregation import mean_over
from gptcore.align.losses.arguments import check_mask, computed, same_shape
from gptcore.align.losses.layout import kept
from gptcore.errors import unknown_name

TIES = ("half", "skip")


class RewardLoss(NamedTuple):
    """The loss, 0-d; and detached, 0-d: how many pairs were not tied, and how many of them the scores order right, half
    a pair where scores are equal."""

    loss: torch.Tensor
    pairs: torch.Tensor
    right: torch.Tensor


def pairwise(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    margin: torch.Tensor | float = 0.0,
    centring: float = 0.0,
    total: float | None = None,
) -> RewardLoss:
    """``-log sigmoid(chosen - rejected - margin)`` (Stiennon et al. 2020; margins: Touvron et al. 2023, eq. 2).

    Args:
        chosen, rejected: (P,) scores.
        margin: (P,) or a number, by how much the chosen answer is better.
        centring: weight of ``(chosen + rejected)^2``, which keeps scores around 0 (Eisenstein et al. 2023).
        total: pairs of the whole update, where this is a part of it.
    """
    same_shape("pairwise", chosen=chosen, rejected=rejected)
    chosen, rejected = computed(chosen), computed(rejected)
    losses = -F.logsigmoid(chosen - rejected - margin)
    if centring:
        losses = losses + centring * (chosen + rejected).square()
    return RewardLoss(mean_over(losses, total), *_ordered((chosen - rejected).detach()))


def ranked(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    margin: torch.Tensor | float = 0.0,
    centring: float = 0.0,
    ties: str = "half",
    total: float | None = None,
) -> RewardLoss:
    """The mean over all C(K, 2) pairs of each prompt, then over prompts (Ouyang et al. 2022, eq. 1).

    K scores make all pairs, so each answer goes through the model once, and a prompt with many answers weighs no more
    than one with few.

    Args:
        scores: (P, K).
        ranks: (P, K), smaller is better, equal is tied.
        mask: (P, K) bool, False where a prompt has fewer answers; None: all there.
        margin: a number, or (P,), for pairs that are not tied.
        centring: weight of the square of a pair's summed scores, as in :func:`pairwise`.
        ties: "half": a tied pair counts half as won and half as lost, and is cheapest at equal scores. "skip": it is no
            pair.
        total: prompts of the whole update; None: of this call, those with at least one pair.

    Raises:
        ValueError: not a single pair and no ``total``.
    """
    if ties not in TIES:
        raise unknown_name("rule for ties", ties, TIES)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    same_shape("ranked", scores=scores, ranks=ranks, mask=mask)
    check_mask("ranked", mask)
    better, worse = _pair_indices(scores)
    values = kept(computed(scores), mask)
    first, second = values[:, better], values[:, worse]
    order = torch.sign(ranks[:, worse] - ranks[:, better])  # 1 where the first is better, 0 where tied
    counted = mask[:, better] & mask[:, worse]
    if ties == "skip":
        counted = counted & (order != 0)
    losses = _pair_losses(first - second, order, _per_prompt(margin, values))
    if centring:
        losses = losses + centring * (first + second).square()
    pairs = counted.sum(-1)
    prompts = int((pairs > 0).sum())
    if total is None and not prompts:
        raise ValueError("ranked: no prompt has two answers to compare")
    each = kept(losses, counted).sum(-1) / pairs.clamp(min=1)
    untied = counted & (order != 0)
    signed = ((first - second) * order).detach()[untied]
    return RewardLoss(mean_over(each, prompts if total is None else total), *_ordered(signed))


def centre(scores: torch.Tensor) -> torch.Tensor:
    """The bias that makes reference answers score 0 on average: minus their mean, 0-d (Ouyang et al. 2022, C.2)."""
    return -computed(scores.detach()).mean()


def _pair_indices(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"ranked: scores has shape {tuple(scores.shape)}, expected (prompts, K) with K at least 2"
        )
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
    return first, second


def _per_prompt(margin: torch.Tensor | float, values: torch.Tensor) -> torch.Tensor:
    margin = torch.as_tensor(margin, dtype=values.dtype, device=values.device)
    if margin.dim() > 1 or (margin.dim() == 1 and margin.shape[0] != values.shape[0]):
        raise ValueError(f"ranked: margin has shape {tuple(margin.shape)}, expected ({values.shape[0]},)")
    return margin[:, None] if margin.dim() else margin


def _pair_losses(difference: torch.Tensor, order: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    signed = torch.where(order >= 0, difference, -difference)
    tied = -0.5 * (F.logsigmoid(difference) + F.logsigmoid(-difference))
    return torch.where(order == 0, tied, -F.logsigmoid(signed - margin))


def _ordered(differences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    right = (differences > 0).float().sum() + 0.5 * (differences == 0).float().sum()
    return torch.tensor(float(differences.numel()), device=differences.device), right
