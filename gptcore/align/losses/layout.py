"""Sequences in rows or laid end to end: the sums and marks that losses need, for both layouts.

Padded: tensors are (B, T), ``cu_seqlens`` is None, each row one sequence, padding wherever the mask is False.
Packed: tensors are (N,) or (1, N), ``cu_seqlens`` (S + 1) int32 with the first token of each sequence and N.

A mask is True where a response token counts. What lies under False has no influence, not even NaN: inputs are
replaced there before anything is computed, so that neither a value nor a gradient sees them.
"""

from __future__ import annotations

import itertools

import torch


def kept(values: torch.Tensor, mask: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """``values`` with ``fill`` where the mask is False. A product would keep NaN and infinity: NaN x 0 is NaN."""
    return torch.where(mask, values, torch.full_like(values, fill))


def check_cu_seqlens(function: str, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Packed tensors are one row, and ``cu_seqlens`` runs from 0 to its length without falling."""
    if tokens.dim() > 2 or (tokens.dim() == 2 and tokens.shape[0] != 1):
        raise ValueError(
            f"{function}: packed tensors are (N,) or (1, N), got {tuple(tokens.shape)} with cu_seqlens"
        )
    ends = cu_seqlens.tolist()
    if cu_seqlens.dim() != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens.numel():
        raise ValueError(
            f"{function}: cu_seqlens must run from 0 to {tokens.numel()}, got {ends[:1]} to {ends[-1:]}"
        )
    if any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{function}: cu_seqlens falls: {ends}")


def lengths_of(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(S,) int64 tokens in each packed sequence."""
    return cu_seqlens[1:].long() - cu_seqlens[:-1].long()


def sequence_sum(values: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Sums over each sequence: (B, T) to (B,), packed to (S,). Differentiable; one fixed order of addition."""
    if cu_seqlens is None:
        return values.sum(-1)
    return torch.segment_reduce(values.reshape(-1), "sum", lengths=lengths_of(cu_seqlens), initial=0.0)


def spread(
    per_sequence: torch.Tensor, like: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """A number for each sequence to all its tokens: (B,) to (B, T), or (S,) to ``like``'s packed shape."""
    if cu_seqlens is None:
        return per_sequence[:, None].expand(like.shape)
    return per_sequence.repeat_interleave(lengths_of(cu_seqlens), output_size=like.numel()).view(like.shape)


def counts(mask: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Response tokens of each sequence, (B,) or (S,), f32."""
    return sequence_sum(mask.float(), cu_seqlens)


def sequence_ends(tokens: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """True at the last place of each sequence, padding or not, in ``tokens``' shape."""
    ends = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    if cu_seqlens is None:
        ends[..., -1:] = True
        return ends
    filled = lengths_of(cu_seqlens) > 0
    ends.view(-1)[cu_seqlens[1:].long()[filled] - 1] = True
    return ends


def next_kept(mask: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Along the last axis, the place of the next True after each place in its own sequence, or -1. int64."""
    length = mask.shape[-1]
    places = torch.arange(length, device=mask.device).expand(mask.shape)
    nothing = torch.full_like(places, length)
    here = torch.where(mask, places, nothing)
    at_or_after = here.flip(-1).cummin(-1).values.flip(-1)
    after = torch.cat([at_or_after[..., 1:], nothing[..., :1]], -1)
    if cu_seqlens is not None:
        limit = spread(cu_seqlens[1:].long(), mask, cu_seqlens)
        after = torch.where(after < limit, after, nothing)
    return torch.where(after < length, after, -1)


def last_kept(mask: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """True at the last response token of each sequence, nowhere in one that has none."""
    return mask & (next_kept(mask, cu_seqlens) < 0)
