"""Random access to randomness: the i-th element of a shuffle, without the shuffle.

A permutation of n items is a Feistel network on the next power of four, walked until it lands below n.
Nothing is stored: position, number of items and a key give the element, so a data order is resumed,
jumped into and split over ranks by arithmetic alone.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6  # four make a Feistel network of good functions look random; two more for small halves
_WORD = 0xFFFFFFFFFFFFFFFF
_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: SplitMix64's increment


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on a uint64 array: every input bit changes each output bit half the time."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive(seed: int, *path: int) -> int:
    """A 64-bit key for a place, such as (seed, source, epoch); neighbouring places get unrelated keys."""
    key = seed & _WORD
    for value in (0, *path):
        key = _mix_int(_mix_int(((key + _STEP) ^ (value * 0xD1342543DE82EF95)) & _WORD))
    return key


def _mix_int(value: int) -> int:
    """``mix`` of one Python integer."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _WORD
    return value ^ (value >> 31)


def random_below(n: int, key: int, counters: np.ndarray) -> np.ndarray:
    """A number below ``n`` for each counter, (N,) int64; the bias is below n / 2**53."""
    words = mix(mix(counters.astype(np.uint64) * np.uint64(_STEP) + np.uint64(key)))
    # The top 53 bits as a fraction: exact in float64, unlike a remainder for n near a power of two.
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53 * n).astype(np.int64)


def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a shuffle of ``n`` items, chosen by ``key``, sends ``positions``; (N,) int64 in, (N,) int64 out.

    A bijection of 0..n-1. The domain of the network is below 4n, so a walk takes under four steps on
    average, whatever n is. Raises ``ValueError`` for positions outside.
    """
    positions = np.asarray(positions)
    if positions.size and not (int(positions.min()) >= 0 and int(positions.max()) < n):
        raise ValueError(f"permute: got a position outside 0 to {n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive(key, round)) for round in range(_ROUNDS)]
    values = _network(positions.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _network(values[outside], half, keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def _network(values: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    """A keyed bijection of ``2 * half`` bits."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right
