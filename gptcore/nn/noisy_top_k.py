"""The losses of noisy top-K gating: Shazeer et al. 2017, "Outrageously Large Neural Networks", section 4, appendix A.

Shapes: N tokens, E experts, K choices. Every step has the same bits for every thread count: sums over tokens go
through ``linear``, and softplus is written by torch's logsigmoid, because torch's own changed its last bit with the
thread count (5 of 53,292 numbers, whose runs for each thread end in other code).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptcore.nn.linear import linear

# Keeps a quotient by the noise's deviation, and its gradient, finite where softplus underflows.
_LEAST_SCALE = 1e-6


class NoisyLogits(NamedTuple):
    """(N, E) each: ``noisy``, of which experts are chosen, is ``clean`` + normal numbers * ``scale``.

    ``scale`` None: there is no noise, and ``noisy`` is ``clean``.
    """

    noisy: Tensor
    clean: Tensor
    scale: Tensor | None = None

    @classmethod
    def drawn(cls, clean: Tensor, raw_scale: Tensor, normal: Tensor) -> NoisyLogits:
        """Equation 4, H = x W_g + StandardNormal() * softplus(x W_noise), from the two products and the numbers."""
        scale = -torch.nn.functional.logsigmoid(-raw_scale)
        return cls(clean + normal * scale, clean, scale)


def balance_loss(
    logits: NoisyLogits,
    experts: Tensor,
    *,
    renormalise: bool = True,
    mask: Tensor | None = None,
    w_importance: float = 1.0,
    w_load: float = 1.0,
) -> Tensor:
    """() ``w_importance`` * CV(importance)^2 + ``w_load`` * CV(load)^2, equations 6 to 11; 0 without a token.

    Args:
        experts: (N, K) chosen from ``logits.noisy``, negative for padding.
        renormalise: the gates are a softmax over the K chosen, as in the paper; otherwise over all experts.
        mask: (N,) bool, False for padding.
    """
    if mask is not None:  # whatever padding holds, NaN too
        keep = mask[:, None]
        logits = NoisyLogits(*(None if x is None else torch.where(keep, x, 0.0) for x in logits))  # type: ignore[arg-type]
    index = experts.clamp(min=0).long()
    given = importance(logits.noisy, index, renormalise, mask)
    return w_importance * squared_variation(given) + w_load * squared_variation(load(logits, index, mask))


def importance(noisy: Tensor, index: Tensor, renormalise: bool, mask: Tensor | None) -> Tensor:
    """(E,) the gates of each expert, summed over tokens, before any is dropped for capacity."""
    if renormalise:
        gates = torch.softmax(noisy.gather(1, index), dim=-1)
    else:
        gates = torch.softmax(noisy, dim=-1).gather(1, index)
    return _sum_over_tokens(torch.zeros_like(noisy).scatter(1, index, gates), mask)


def load(logits: NoisyLogits, index: Tensor, mask: Tensor | None) -> Tensor:
    """(E,) how many tokens an expert would get: the sum of the probabilities that a new draw of its own noise, that of
    the others kept, leaves or brings it among the K largest. Without noise, how many it gets."""
    noisy, clean, scale = logits
    top_k, chosen = index.shape[1], torch.zeros_like(noisy, dtype=torch.bool).scatter(1, index, True)
    if scale is None or top_k == noisy.shape[1]:
        return _sum_over_tokens(chosen.to(noisy.dtype), mask)
    largest = noisy.topk(top_k + 1).values
    # The K-th largest of the others: for one of the chosen that is the first that is not.
    others = torch.where(chosen, largest[:, top_k:], largest[:, top_k - 1 : top_k])
    return _sum_over_tokens(torch.special.ndtr((clean - others) / scale.clamp(min=_LEAST_SCALE)), mask)


def squared_variation(x: Tensor) -> Tensor:
    """() the squared coefficient of variation of x (E,), by its population variance; 0 where all are 0."""
    mean = x.mean()
    return (x - mean).square().mean() / torch.where(mean == 0, 1.0, mean.square())


def _sum_over_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    counted = x.new_ones(1, x.shape[0]) if mask is None else mask[None].to(x.dtype)
    return linear(counted, x.t().contiguous())[0]
