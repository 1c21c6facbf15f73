"""Kullback-Leibler divergence of a policy from its reference: estimators per token, the exact sum, and the coefficient.

With a token drawn from the policy and ``d = log p - log p_ref`` (Schulman 2020, "Approximating KL divergence"):

  k1 = d                    unbiased, may be negative
  k2 = d^2 / 2              biased, never negative
  k3 = exp(-d) - 1 + d      unbiased, never negative

As a *loss* they differ from what they estimate, because the sampling is not differentiated (Tang and Munos 2025, "On a
few pitfalls in KL divergence gradient estimation for RL"): the expected gradient of k1 is zero, that of k2 is the
gradient of KL(p || p_ref), that of k3 the gradient of KL(p_ref || p). In the reward, where nothing is differentiated,
k1 gives the gradient of KL(p || p_ref).
"""

from __future__ import annotations

import torch

from gptcore.align.losses.arguments import check_mask, check_range, computed, same_shape
from gptcore.align.losses.layout import kept
from gptcore.errors import unknown_name

ESTIMATORS = ("k1", "k2", "k3")


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """``log p - log p_ref`` of the sampled tokens, any shape; 0 where ``mask`` is False, in the gradient too, even if
    NaN or infinity stands there (a mask that is multiplied on later keeps NaN)."""
    same_shape("k1", logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    if mask is not None:
        check_mask("k1", mask)
        logprobs, ref_logprobs = kept(logprobs, mask), kept(ref_logprobs, mask)
    return computed(logprobs) - computed(ref_logprobs)


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Half the square of :func:`k1`."""
    return 0.5 * k1(logprobs, ref_logprobs, mask).square()


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """``exp(-d) - 1 + d``, with expm1: near d = 0 the plain form loses every digit and can turn negative."""
    d = k1(logprobs, ref_logprobs, mask)
    return torch.expm1(-d) + d


def estimate(
    kind: str, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The estimator of that name, "k1", "k2" or "k3"."""
    if kind not in ESTIMATORS:
        raise unknown_name("KL estimator", kind, ESTIMATORS)
    return {"k1": k1, "k2": k2, "k3": k3}[kind](logprobs, ref_logprobs, mask)


def exact(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || p_ref) of whole distributions: logits (..., V) to (...). Logits of -inf are tokens of probability 0;
    where the policy gives a token that the reference excludes, the result is infinite."""
    same_shape("exact", logits=logits, ref_logits=ref_logits)
    log_p = computed(logits).log_softmax(-1)
    log_q = computed(ref_logits).log_softmax(-1)
    possible = log_p > -torch.inf
    # both sides of the product are replaced: 0 * (-inf + inf) would be NaN, in the gradient too
    p = torch.where(possible, log_p, -torch.inf).exp()
    difference = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    return (p * difference).sum(-1)


def adapted(
    coefficient: float, kl: float, *, target: float, episodes: int, horizon: float = 10_000.0
) -> float:
    """The next KL coefficient of the adaptive controller: up where ``kl`` (nats an episode) exceeds ``target``.

    Ziegler et al. 2019, section 2.2: ``coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)``.
    """
    check_range("adapted", "target", target, 0.0, float("inf"), above=True)
    check_range("adapted", "horizon", horizon, 0.0, float("inf"), above=True)
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * episodes / horizon)
