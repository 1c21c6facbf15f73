"""The checksum CRC-32C of an array's bytes, which may be copied in the same pass."""

from __future__ import annotations

from gptcore import backend
from gptcore.ops.arrays import Array

_POLYNOMIAL = 0x82F63B78


def crc32c(x: Array, initial: int = 0, *, out: Array | None = None) -> int:
    """The CRC-32C (Castagnoli) of the bytes of ``x``, by all threads; not differentiable.

    It finds every error of up to 32 bits in a row, and any other but one in 2**32. It does not withstand an adversary.

    Args:
        x: contiguous, any shape and dtype; torch tensor or NumPy array.
        initial: the CRC of the bytes before those of ``x``, 0 to 2**32 - 1; 0: there are none. So a message may come in
            parts, as with ``zlib.crc32``.
        out: contiguous, of as many bytes as ``x`` and not of its memory; receives them.

    Returns:
        0 to 2**32 - 1.

    Raises:
        ValueError, TypeError: arrays or a number that do not fit; nothing is written then.

    Source: Castagnoli, Bräuer and Herrmann 1993, "Optimization of cyclic redundancy-check codes with 24 and 32 parity
    bits"; RFC 3720, appendix B.4, has vectors that the tests hold this against.
    """
    if not 0 <= initial < 1 << 32:
        raise ValueError(f"crc32c: argument 'initial': got {initial}, expected 0 to 2**32 - 1")
    return backend.extension().crc32c(x, initial, out)


def crc32c_reference(data: bytes, initial: int = 0) -> int:
    """The same, bit by bit."""
    register = initial ^ 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (_POLYNOMIAL if register & 1 else 0)
    return register ^ 0xFFFFFFFF
