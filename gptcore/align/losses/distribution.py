"""Log-probabilities and entropy of the distribution that tokens were sampled from, by temperature and truncation."""

from __future__ import annotations

import torch

from gptcore.align.losses.arguments import check_range, computed

NOTHING = -1  # fills the lists of kept tokens, which differ in length


def sampled_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """``log p(token)`` under ``softmax(logits / temperature)`` over the kept tokens, (..., V) to (...), f32.

    Args:
        tokens: (...) int64.
        temperature: above 0, the sampler's; at another one the ratio of new to old policy is not 1 even before the
            first update.
        keep: (..., k) int64, the token ids that truncation (top-k, top-p) left when the token was drawn, padded with
            -1. The set is the sampler's, stored: recomputed from new logits it moves with the policy.

    Raises:
        ValueError: a sampled token that is not among those kept.
    """
    scaled = _scaled(logits, temperature)
    picked = scaled.gather(-1, tokens[..., None])[..., 0]
    if keep is None:
        return picked - scaled.logsumexp(-1)
    there = keep != NOTHING
    if not bool(((keep == tokens[..., None]) & there).any(-1).all()):
        raise ValueError("sampled_logprobs: a sampled token is not among those that were kept")
    left = torch.where(there, scaled.gather(-1, keep.clamp(min=0)), -torch.inf)
    return picked - left.logsumexp(-1)


def entropy(logits: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """Entropy of ``softmax(logits / temperature)`` in nats, (..., V) to (...), f32; logits of -inf add nothing."""
    log_p = _scaled(logits, temperature).log_softmax(-1)
    possible = log_p > -torch.inf
    p = torch.where(possible, log_p, -torch.inf).exp()
    return -(p * torch.where(possible, log_p, 0.0)).sum(-1)


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    check_range("sampled_logprobs", "temperature", temperature, 0.0, float("inf"), above=True)
    return computed(logits) / temperature
