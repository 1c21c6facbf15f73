"""Several sources by weight: which source a sample comes from, by arithmetic.

Samples are dealt in blocks. In every block each source has its share, rounded so that the counts never
drift from the weights by more than one; inside a block the order is a shuffle, and each source counts its
samples in that order. So the source of sample g, and its number there, follow from (seed, g) alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from gptcore.data.permutation import derive, permute
from gptcore.errors import UserError

BLOCK = 1 << 14  # samples: 128 sources of equal weight fit, and a block is dealt in milliseconds


class Mixture:
    """Shares of ``weights``, normalised to one; ``seed`` decides the order inside blocks."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, np.float64)
        if shares.ndim != 1 or not shares.size or not np.all(np.isfinite(shares)) or np.any(shares <= 0):
            raise UserError(f"weights: got {list(weights)}, expected one positive number per source")
        self.shares = shares / shares.sum()
        # The largest share takes what rounding leaves over, which is below one sample per source.
        self._rest = int(np.argmax(self.shares))
        if self.shares[self._rest] * BLOCK < len(shares):
            raise UserError(f"weights: got {len(shares)} sources, too many for blocks of {BLOCK} samples")
        self._seed = seed
        self._dealt = functools.lru_cache(maxsize=4)(self._deal)

    def given(self, blocks: int) -> np.ndarray:
        """Samples of each source in the first ``blocks`` blocks, (sources,) int64."""
        counts = np.floor(self.shares * (blocks * BLOCK)).astype(np.int64)
        counts[self._rest] += blocks * BLOCK - counts.sum()
        return counts

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample and its number within that source, two (N,) int64 arrays."""
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(samples // BLOCK).tolist():
            inside = samples // BLOCK == block
            places = samples[inside] - block * BLOCK
            sources[inside], numbers[inside] = (dealt[places] for dealt in self._dealt(block))
        return sources, numbers

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """``locate`` for all samples of one block."""
        before = self.given(block)
        counts = self.given(block + 1) - before
        slots = permute(np.arange(BLOCK), BLOCK, derive(self._seed, block))
        sources = np.searchsorted(np.cumsum(counts), slots, side="right")
        numbers = np.empty(BLOCK, np.int64)
        for source, (start, count) in enumerate(zip(before.tolist(), counts.tolist(), strict=True)):
            numbers[sources == source] = np.arange(start, start + count)
        return sources, numbers
