"""Keys and values of new tokens into transformers' caches, without copying all the old ones each time.

transformers' dynamic cache concatenates: each token copies everything before it. Here its layer keeps what it always
keeps, ``keys`` and ``values`` (B, Hkv, S, D), as views of buffers with room behind them, into which the next tokens
are written. Whatever else somebody does to the layer (crop, reorder, select) makes tensors that are not those views,
and the next append starts from a copy of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Room for so many more tokens, or half as many as there are, whichever is more.
_ROOM = 64


def plain(past: Any) -> bool:
    """Whether the cache takes keys and values of a layer by ``update(key, value, layer)`` and nothing else."""
    return past is None or not hasattr(past, "cross_attention_cache")


def append(past: Any, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """All keys and values of ``layer`` with those of new tokens (B, Hkv, T, D) behind them, as ``past.update``."""
    own = _dynamic_layer(past, layer)
    if own is None or own.keys.shape[:2] != key.shape[:2] or own.keys.dtype != key.dtype:
        both: tuple[Tensor, Tensor] = past.update(key, value, layer)
        return both
    own.keys = _appended(own, "keys", key)
    own.values = _appended(own, "values", value)
    return own.keys, own.values


def _dynamic_layer(past: Any, layer: int) -> Any:
    """The layer of a plain dynamic cache that holds tokens already, or None."""
    if type(past).__name__ != "DynamicCache" or past.offloading or layer >= len(past.layers):
        return None
    own = past.layers[layer]
    plain_kind = type(own).__name__ == "DynamicLayer" and type(own).__module__ == "transformers.cache_utils"
    return own if plain_kind and own.is_initialized and own.keys.ndim == 4 else None


class _Room:
    """A buffer (B, Hkv, capacity, D) and how much of it is written, by whichever layer got there first."""

    def __init__(self, held: Tensor, more: int) -> None:
        length = held.shape[2]
        capacity = length + more + max(_ROOM, length // 2)
        self.buffer = torch.empty((*held.shape[:2], capacity, held.shape[3]), dtype=held.dtype)
        self.buffer[:, :, :length] = held
        self.written = length


def _appended(own: Any, name: str, new: Tensor) -> Tensor:
    held: Tensor = getattr(own, name)
    room: _Room | None = own.__dict__.get("_gptcore_" + name)
    length, count = held.shape[2], new.shape[2]
    in_place = (
        room is not None
        and room.written == length
        and held.data_ptr() == room.buffer.data_ptr()
        and held.stride() == room.buffer.stride()
        and length + count <= room.buffer.shape[2]
        # what was made in inference mode must not be written outside of it
        and (torch.is_inference_mode_enabled() or not room.buffer.is_inference())
    )
    if room is None or not in_place:
        room = _Room(held, count)
        setattr(own, "_gptcore_" + name, room)
    room.buffer[:, :, length : length + count] = new
    room.written = length + count
    return room.buffer[:, :, : length + count]
