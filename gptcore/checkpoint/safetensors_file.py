"""Streams tensors into a safetensors file.

The library's own writer hides the file descriptor, which must be synced and locked here, and turns
"no space left" into an error without errno. The format is eight bytes of header length, a JSON header,
and the bytes of the tensors; reading stays with the library, which validates it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64  # of the first tensor in the file: a cache line, so that a mapped file is vector-aligned


def _dtype_name(dtype: torch.dtype) -> str:
    import torch

    names = {
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
    if dtype not in names:
        raise ValueError(f"write_safetensors: argument 'tensors': got {dtype}, which the format lacks")
    return names[dtype]


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write contiguous CPU tensors, widest dtype first so that every tensor stays aligned to its dtype.

    Raises:
        OSError: from the file, with its errno.
        ValueError: a dtype that the format lacks.
    """
    import torch

    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        if tensors[name].numel():
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
