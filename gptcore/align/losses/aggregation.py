"""From numbers per token to one loss: which tokens count how much.

Every loss is ``sum(weight * value)`` with weights that depend on masks alone. A batch that is split into micro-batches
gives each the same ``total`` (tokens or sequences of the whole update), and the parts add up to the loss of the whole,
whatever their lengths. Averages of micro-batches' averages do not (transformers #34191, axolotl #2262).
"""

from __future__ import annotations

import torch

from gptcore.align.losses.arguments import check_mask, computed, same_shape
from gptcore.align.losses.layout import check_cu_seqlens, counts, kept, spread
from gptcore.errors import unknown_name

# The names under which papers and other trainers know them.
AGGREGATIONS = {
    "token_mean": "token_mean",  # every token of the batch counts the same
    "sequence_mean": "sequence_mean",  # mean over the sequence's tokens, then over sequences
    "sequence_sum": "sequence_sum",  # sum over the sequence's tokens, mean over sequences
    "constant": "constant",  # sum over tokens / (sequences x a constant length)
    "grpo": "sequence_mean",  # Shao et al. 2024 (DeepSeekMath), eq. 3
    "dapo": "token_mean",  # Yu et al. 2025, eq. 8
    "bnpo": "token_mean",
    "dr_grpo": "constant",  # Liu et al. 2025, section 3.1
    "reinforce": "sequence_sum",
}


def token_weights(
    mask: torch.Tensor,
    aggregation: str = "token_mean",
    *,
    cu_seqlens: torch.Tensor | None = None,
    total: float | None = None,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight of each token in the loss, of ``dtype``, in the mask's shape; 0 where the mask is False.

    Args:
        mask: (B, T) or packed, bool, True where a token counts.
        aggregation: a name of ``AGGREGATIONS``.
        total: tokens ("token_mean") or sequences (the others) of the whole update; None: of this batch, where
            sequences without a single token do not count.
        length: the constant of "constant".

    Raises:
        ValueError: a mask without a True and no ``total``, an unknown aggregation, a ``total`` or ``length`` that is
            not positive.
        TypeError: a mask that is not bool.
    """
    name = "token_weights"
    check_mask(name, mask)
    if cu_seqlens is not None:
        check_cu_seqlens(name, mask, cu_seqlens)
    if aggregation not in AGGREGATIONS:
        raise unknown_name("aggregation", aggregation, AGGREGATIONS)
    how = AGGREGATIONS[aggregation]
    if how == "constant" and (length is None or length < 1):
        raise ValueError(f"{name}: aggregation '{aggregation}' needs length, the constant, got {length}")
    tokens = counts(mask, cu_seqlens)
    found = float(tokens.sum() if how == "token_mean" else (tokens > 0).sum())
    if total is None and not found:
        raise ValueError(f"{name}: the mask has no True: there is nothing to average over")
    whole = found if total is None else float(total)
    if not whole > 0:
        raise ValueError(f"{name}: total is {total}, expected a positive number")
    weights = mask.to(dtype) / (whole * length if how == "constant" and length else whole)
    if how != "sequence_mean":
        return weights
    return weights / spread(tokens.clamp(min=1), mask, cu_seqlens)


def aggregate(
    values: torch.Tensor,
    mask: torch.Tensor,
    aggregation: str = "token_mean",
    *,
    cu_seqlens: torch.Tensor | None = None,
    total: float | None = None,
    length: int | None = None,
) -> torch.Tensor:
    """``values`` (B, T) or packed, to one number by :func:`token_weights`; outside the mask they may be anything."""
    same_shape("aggregate", values=values, mask=mask)
    values = computed(values)
    weights = token_weights(
        mask, aggregation, cu_seqlens=cu_seqlens, total=total, length=length, dtype=values.dtype
    )
    return (kept(values, mask) * weights).sum()


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the mask's True; a 0-d tensor, 0 where there is none."""
    same_shape("masked_mean", values=values, mask=mask)
    values = computed(values)
    return kept(values, mask).sum() / mask.sum().clamp(min=1)


def mean_over(values: torch.Tensor, total: float | None = None) -> torch.Tensor:
    """``values`` (P,), one for each pair or prompt, to one number: their sum over ``total``, by default P.

    Raises:
        ValueError: no values and no ``total``, or one that is not positive.
    """
    whole = values.numel() if total is None else total
    if not whole > 0:
        raise ValueError(
            f"mean_over: total is {whole}, expected a positive number: there is nothing to average"
        )
    return computed(values).sum() / whole
