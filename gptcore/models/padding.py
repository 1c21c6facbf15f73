"""Batches of rows of unequal length: the tokens that count, laid end to end as documents.

So padding meets no layer at all: nothing attends to it, it takes no expert's place, counts in no loss and costs
no arithmetic, wherever in its row it stands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """N' tokens of (B, T): ``kept`` (N',) int64 are their places among the B·T, ``cu_seqlens`` bounds their rows, or
    the documents of those that were bounded already; one of padding alone has length 0."""

    shape: tuple[int, int]
    kept: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Padding:
        """Where ``mask`` (B, T) bool is True a token counts.

        Raises:
            ValueError, TypeError: a mask that does not fit, or that leaves no token.
        """
        if mask.shape != tokens.shape or tokens.dim() != 2:
            got, expected = tuple(mask.shape), tuple(tokens.shape)
            raise ValueError(
                f"GPT: argument 'mask': got shape {got}, expected that of the tokens, {expected}"
            )
        if mask.dtype != torch.bool:
            raise TypeError(f"GPT: argument 'mask': got {mask.dtype}, expected torch.bool")
        flat = mask.reshape(-1)
        kept = flat.nonzero()[:, 0]
        if len(kept) == 0:
            raise ValueError("GPT: argument 'mask': got no token that counts, expected at least one")
        rows, length = tokens.shape
        bounds = (
            torch.arange(rows + 1, device=mask.device) * length if cu_seqlens is None else cu_seqlens.long()
        )
        before = torch.nn.functional.pad(flat.cumsum(0), (1, 0))
        return cls((rows, length), kept, before[bounds].to(torch.int32))

    def take(self, x: Tensor) -> Tensor:
        """(1, N') of x (B, T)."""
        return x.reshape(-1)[self.kept][None]

    def put(self, x: Tensor) -> Tensor:
        """(B, T, ...) of x (1, N', ...), zeros at padding."""
        full = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return full.index_copy(0, self.kept, x[0]).view(*self.shape, *x.shape[2:])
