"""Checksums of what a checkpoint holds, by the names under which its manifest has them.

CRC-32C for tensors, since it is made while they are copied; it finds what disks and cables do, and is no signature.
SHA-256 was that of checkpoints before, and is that of manifests and headers.
"""

from __future__ import annotations

import hashlib

import numpy

from gptcore.ops.crc32c import crc32c

CRC32C, SHA256 = "crc32c", "sha256"
NAMES = (CRC32C, SHA256)


def as_text(crc: int) -> str:
    """A CRC-32C as manifests have it."""
    return f"{crc:08x}"


def checksum(name: str, data: numpy.ndarray, out: numpy.ndarray | None = None) -> str:
    """The checksum ``name`` of the bytes ``data``, in hexadecimal; ``out``, as long, receives them."""
    if name == CRC32C:
        return as_text(crc32c(data, out=out))
    if out is not None:
        out[:] = data
    return hashlib.sha256(data.data).hexdigest()
