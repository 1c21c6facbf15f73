"""Random bits by counter: Philox4x32-10, the generator behind every random choice of a kernel."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty_like
from gptcore.ops.registration import TorchOp

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counters: Array, seed: int, *, out: Array | None = None) -> Array:
    """128 random bits for each counter: the same on every machine, in any order.

    Args:
        counters: (N, 4) int32, contiguous, read as 32 unsigned bits each; torch tensor, NumPy or CuPy array.
        seed: the key, 64 bits: -2**63 to 2**64 - 1, equal modulo 2**64.
        out: where to write; like ``counters``, or ``counters`` itself.

    Returns:
        (N, 4) int32, every bit of them random.

    Raises:
        ValueError, TypeError: shapes, dtypes, layouts or devices that do not fit; nothing is written then.

    Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; its library
    Random123 publishes the vectors that the tests hold this against.
    """
    signed = signed_seed("philox", seed)
    if out is None:
        return _philox(counters, signed)
    backend.extension().philox(counters, signed, out)
    return out


def philox_reference(counters: Any, seed: int) -> Any:
    """The same in plain torch.

    Args:
        counters: (..., 4) of any integer dtype, taken modulo 2**32.
        seed: as above, or an int64 tensor that broadcasts to (...).

    Returns:
        (..., 4) int64, 0 to 2**32 - 1.
    """
    import torch

    a, b, c, d = (counters.to(torch.int64) & _WORD).unbind(-1)
    low, high = seed & _WORD, seed >> 32 & _WORD
    for turn in range(_ROUNDS):
        first, second = (low + turn * _KEY_STEPS[0]) & _WORD, (high + turn * _KEY_STEPS[1]) & _WORD
        (p_high, p_low), (q_high, q_low) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = q_high ^ b ^ first, q_low, p_high ^ d ^ second, p_low
    return torch.stack((a, b, c, d), -1)


def _product(x: Any, factor: int) -> tuple[Any, Any]:
    """Upper and lower 32 bits of ``x * factor``, by halves of x: int64 has no room for all 64."""
    upper, lower = (x >> 16) * factor, (x & 0xFFFF) * factor
    middle = upper + (lower >> 16)
    return middle >> 16, (middle << 16 | lower & 0xFFFF) & _WORD


def signed_seed(op: str, seed: int) -> int:
    """``seed`` as the int64 of the same 64 bits, which is what crosses into the kernels.

    Raises:
        ValueError: more than 64 bits; names ``op``.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: argument 'seed': got {seed}, expected -2**63 to 2**64 - 1")
    return seed - 2**64 if seed >= 2**63 else seed


def _forward(counters: Any, seed: int) -> Any:
    out = empty_like(counters)
    backend.extension().philox(counters, seed, out)
    return out


_philox = TorchOp(
    "philox",
    "(Tensor counters, int seed) -> Tensor",
    forward=_forward,
    fake=lambda counters, seed: counters.new_empty(counters.shape),
)
