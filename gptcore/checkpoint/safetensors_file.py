"""The safetensors format: eight bytes of header length, a JSON header, the bytes of the tensors.

The library's own writer hides the file descriptor, which must be synced and locked here, and turns
"no space left" into an error without errno; its reader does not say where in the file a tensor lies. Files of
others are read with the library, which validates them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import torch

_ALIGNMENT = 64  # of the first tensor in the file: a cache line, so that a mapped file is vector-aligned
_LENGTH = 8  # bytes of the header's length
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Placed(NamedTuple):
    """One tensor of a file: its key, dtype, shape, and its bytes ``begin`` to ``end`` - 1 after the header."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of ``dtype``. Raises ValueError for one that it lacks."""
    if dtype not in _NAMES:
        raise ValueError(f"write_safetensors: argument 'tensors': got {dtype}, which the format lacks")
    return _NAMES[dtype]


def place(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[Placed]:
    """Where each tensor (dtype and shape by key) lies: those of whole cache lines first, which so begin with one, then
    the widest dtype first, so that all are aligned to theirs."""

    def rank(key: str) -> tuple[bool, int, str]:
        dtype, shape = tensors[key]
        return dtype.itemsize * torch.Size(shape).numel() % _ALIGNMENT != 0, -dtype.itemsize, key

    order = sorted(tensors, key=rank)
    placed, offset = [], 0
    for key in order:
        dtype, shape = tensors[key]
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        placed.append(Placed(key, dtype, tuple(shape), offset, end))
        offset = end
    return placed


def header_of(placed: Sequence[Placed], metadata: Mapping[str, str]) -> bytes:
    """Everything that stands before the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for key, dtype, shape, begin, end in placed:
        header[key] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + _LENGTH) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def header_length(start: bytes | memoryview) -> int:
    """Bytes before the first tensor, of a file that begins with ``start``. Raises ValueError for too few bytes."""
    if len(start) < _LENGTH:
        raise ValueError(f"{len(start)} bytes are no safetensors file")
    return _LENGTH + int(struct.unpack("<Q", start[:_LENGTH])[0])


def parse_header(header: bytes) -> dict[str, Placed]:
    """The tensors of a header that :func:`header_of` made, by key. Raises ValueError, KeyError for any other."""
    found = {}
    for key, entry in json.loads(header[_LENGTH:]).items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            found[key] = Placed(key, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin, end)
    return found


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write contiguous CPU tensors, where :func:`place` puts them.

    Raises:
        OSError: from the file, with its errno.
        ValueError: a dtype that the format lacks.
    """
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    stream_safetensors(file, layout, lambda name: [tensors[name]], metadata)


def stream_safetensors(
    file: BinaryIO,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    read: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """As :func:`write_safetensors`, of tensors that ``read`` gives one after the other, in parts if it likes.

    layout: dtype and shape of each by name.
    """
    placed = place(layout)
    file.write(header_of(placed, metadata))
    for entry in placed:
        for part in read(entry.key):
            file.write(bytes_of(part))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous CPU tensor as uint8, empty ones included."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    # Not reshape: a single element counts as contiguous whatever its stride, and keeps it.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The same as Python has it."""
    return flat_bytes(tensor).numpy().data
