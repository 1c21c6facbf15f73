"""Losses over preferred and rejected answers, from log-probabilities of whole answers.

Every function takes numbers per pair, (P,), or per answer: :func:`answer_logprobs` makes them from tokens. Reference
log-probabilities carry no gradient. ``total`` is the number of pairs (or answers) of the whole update where this call
sees a part of it; see ``aggregation.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptcore.align.losses.aggregation import mean_over
from gptcore.align.losses.arguments import check_mask, check_range, computed, same_shape
from gptcore.align.losses.layout import check_cu_seqlens, counts, kept, sequence_sum


class PreferenceLoss(NamedTuple):
    """The loss, 0-d; and of each pair, (P,), detached: what the policy implicitly rewards either answer with, in the
    loss's own units (``beta`` times a log-ratio, where there is a reference). ``accuracy`` is the share of pairs whose
    chosen answer is rewarded more."""

    loss: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor

    @property
    def accuracy(self) -> torch.Tensor:
        return (self.chosen_rewards > self.rejected_rewards).float().mean()

    @property
    def margin(self) -> torch.Tensor:
        return (self.chosen_rewards - self.rejected_rewards).mean()


def answer_logprobs(
    logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    average: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities of tokens, (B, T) or packed, to those of whole answers, (B,) or (S,).

    ``average``: per token, as SimPO and ORPO want it. Raises ValueError where an answer has no token.
    """
    same_shape("answer_logprobs", logprobs=logprobs, mask=mask)
    check_mask("answer_logprobs", mask)
    if cu_seqlens is not None:
        check_cu_seqlens("answer_logprobs", mask, cu_seqlens)
    tokens = counts(mask, cu_seqlens)
    empty = (tokens == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"answer_logprobs: answers {empty[:8]} have no token under the mask")
    sums = sequence_sum(kept(computed(logprobs), mask), cu_seqlens)
    return sums / tokens if average else sums


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    total: float | None = None,
) -> PreferenceLoss:
    """``-log sigmoid(beta h)``, h the chosen answer's log-ratio less the rejected one's (Rafailov et al. 2023, eq. 7).

    ``label_smoothing`` e, the chance that a label is wrong: ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``,
    conservative DPO (Mitchell 2023). ln 2 where the policy is the reference.
    """
    check_range("dpo", "label_smoothing", label_smoothing, 0.0, 0.5)
    better, worse = _log_ratios("dpo", chosen, rejected, ref_chosen, ref_rejected)
    h = beta * (better - worse)
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return _result(losses, beta * better, beta * worse, total)


def ipo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    total: float | None = None,
) -> PreferenceLoss:
    """``(h - 1 / (2 beta))^2``, which has its minimum at a finite h even where labels never disagree (Azar et al. 2023,
    eq. 17). ``1 / (4 beta^2)`` where the policy is the reference."""
    check_range("ipo", "beta", beta, 0.0, float("inf"), above=True)
    better, worse = _log_ratios("ipo", chosen, rejected, ref_chosen, ref_rejected)
    losses = (better - worse - 1.0 / (2.0 * beta)).square()
    return _result(losses, beta * better, beta * worse, total)


def kto(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    total: float | None = None,
) -> PreferenceLoss:
    """Kahneman-Tversky optimisation from single labels (Ethayarajh et al. 2024, eq. 8).

    ``w (1 - sigmoid(beta (r - kl)))`` for a desirable answer and ``w (1 - sigmoid(beta (kl - r)))`` for the others, r
    the answer's log-ratio.

    Args:
        logprobs, ref_logprobs: (N,), of whole answers.
        desirable: (N,) bool.
        kl: the reference point z0, of :func:`kto_reference_point`; no gradient goes through it.

    Returns:
        the loss, a mean over N; the rewards of the desirable, and of the undesirable answers.
    """
    same_shape("kto", logprobs=logprobs, ref_logprobs=ref_logprobs, desirable=desirable)
    check_mask("kto", desirable, "desirable")
    ratio = computed(logprobs) - computed(ref_logprobs.detach())
    point = torch.as_tensor(kl, dtype=ratio.dtype, device=ratio.device).detach()
    distance = beta * (ratio - point)
    losses = torch.where(
        desirable, desirable_weight * torch.sigmoid(-distance), undesirable_weight * torch.sigmoid(distance)
    )
    rewards = beta * ratio.detach()
    return PreferenceLoss(mean_over(losses, total), rewards[desirable], rewards[~desirable])


def kto_reference_point(mismatched: torch.Tensor, ref_mismatched: torch.Tensor) -> torch.Tensor:
    """KTO's z0: the mean log-ratio of answers paired with other prompts' (N,), at least 0; without a gradient. A whole
    update's, so that micro-batches and ranks agree."""
    same_shape("kto_reference_point", mismatched=mismatched, ref_mismatched=ref_mismatched)
    return (computed(mismatched.detach()) - computed(ref_mismatched)).mean().clamp(min=0.0)


def orpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_nll: torch.Tensor,
    *,
    beta: float = 0.1,
    total: float | None = None,
) -> PreferenceLoss:
    """``nll - beta log sigmoid(log odds(chosen) - log odds(rejected))`` (Hong et al. 2024, eq. 6).

    Args:
        chosen, rejected: (P,) *average* log-probabilities per token, below 0; log odds are ``log p - log(1 - p)``.
        chosen_nll: 0-d, the supervised loss on the chosen answers.
    """
    same_shape("orpo", chosen=chosen, rejected=rejected)
    log_odds = _log_odds("chosen", chosen) - _log_odds("rejected", rejected)
    preference = mean_over(-F.logsigmoid(log_odds), total)
    rewards = (beta * computed(x).detach() for x in (chosen, rejected))
    return PreferenceLoss(chosen_nll + beta * preference, *rewards)


def simpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    total: float | None = None,
) -> PreferenceLoss:
    """``-log sigmoid(beta (chosen - rejected) - gamma)`` of *average* log-probabilities per token, without a reference
    (Meng et al. 2024, eq. 6). ``gamma`` is the margin in the loss's units, not its ratio to ``beta``."""
    same_shape("simpo", chosen=chosen, rejected=rejected)
    check_range("simpo", "label_smoothing", label_smoothing, 0.0, 0.5)
    better, worse = beta * computed(chosen), beta * computed(rejected)
    h = better - worse - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return _result(losses, better, worse, total)


def _log_ratios(
    function: str,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    same_shape(function, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    better = computed(chosen) - computed(ref_chosen.detach())
    return better, computed(rejected) - computed(ref_rejected.detach())


def _log_odds(name: str, logprobs: torch.Tensor) -> torch.Tensor:
    """``log p - log(1 - p)``; ``log(-expm1(log p))`` keeps its digits where p is near 1."""
    logprobs = computed(logprobs)
    if not bool((logprobs < 0).all()):
        raise ValueError(
            f"orpo: {name} must be below 0, average log-probabilities; got {float(logprobs.max())}"
        )
    return logprobs - torch.log(-torch.expm1(logprobs))


def _result(
    losses: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, total: float | None
) -> PreferenceLoss:
    return PreferenceLoss(mean_over(losses, total), chosen.detach(), rejected.detach())
