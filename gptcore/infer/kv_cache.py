"""The keys and values of the tokens already seen, so that each new token costs one forward of one token.

A model sees three things: ``cache.length``, ``cache.update(layer, k, v)`` and ``cache.advance(T)``. Behind
them one contiguous block per layer, (B, capacity, Hkv, D), is allocated once; no step allocates. The same
storage read as pages of ``block_size`` tokens is what ``block_table`` and ``pages`` describe, as
``gptcore.ops.attention_paged`` takes them. Sequences of different lengths, in pages that lie anywhere, are
those of ``PagedKVCache``.

Sharing. ``fork()`` copies nothing: both caches read the same storage. The first to append past everything
the others hold goes on in place, which they cannot see, since each reads only its own length. Any other
append to shared storage copies the appender's own tokens first. ``truncate(n)`` only forgets.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from gptcore.errors import UserError


def check_sizes(owner: str, **sizes: int) -> None:
    """Raises UserError, by the name of ``owner``, for the first size that is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{owner}: {name} is {size}, expected at least 1")


class _Storage:
    """Keys and values of every layer, and who reads them."""

    def __init__(self, num_layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.readers: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self.writer: weakref.ref[KVCache] | None = None  # who appended while it was shared


class KVCache:
    """Keys and values of B sequences of equal length.

    num_layers, num_kv_heads (Hkv), head_dim (D): of the model.
    batch (B): sequences. capacity: tokens each can hold, rounded up to whole pages inside.
    dtype, device: of keys and values, as the model computes them.
    block_size: tokens in a page. Default 16.
    Raises UserError when a size is not positive.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block_size: int = 16,
    ) -> None:
        check_sizes(
            "KVCache", num_layers=num_layers, batch=batch, num_kv_heads=num_kv_heads, head_dim=head_dim,
            capacity=capacity, block_size=block_size,
        )  # fmt: skip
        self.batch, self.capacity, self.block_size = batch, capacity, block_size
        padded = -(-capacity // block_size) * block_size
        shape = (batch, padded, num_kv_heads, head_dim)
        self._attach(_Storage(num_layers, shape, dtype, torch.device(device)))
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens stored for each sequence, not counting a forward that has not called ``advance`` yet."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind this cache, shared with its forks while they share."""
        return sum(t.nbytes for t in (*self._storage.keys, *self._storage.values))

    @property
    def block_table(self) -> Tensor:
        """(B, pages) int32: entry (b, j) is the page with tokens j * block_size onwards of sequence b."""
        per_sequence = self._storage.keys[0].shape[1] // self.block_size
        used = -(-self._length // self.block_size)
        first = torch.arange(self.batch, dtype=torch.int32)[:, None] * per_sequence
        return first + torch.arange(used, dtype=torch.int32)

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of ``layer`` as views (pages, block_size, Hkv, D), for ``block_table``."""
        keys, values = self._storage.keys[layer], self._storage.values[layer]
        shape = (-1, self.block_size, *keys.shape[2:])
        return keys.view(shape), values.view(shape)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, Hkv, D) of the T tokens after ``length`` and return all of them.

        Returns views (B, length + T, Hkv, D), good until the next call. Repeating a call before ``advance``
        overwrites the same places. Raises UserError when the capacity does not suffice or the shape is
        not the cache's; nothing is written then.
        """
        end = self._length + k.shape[1]
        self._check(k, v, end)
        self._own()
        keys, values = self._storage.keys[layer], self._storage.values[layer]
        keys[:, self._length : end].copy_(k)
        values[:, self._length : end].copy_(v)
        return keys[:, :end], values[:, :end]

    def advance(self, count: int) -> None:
        """Count the T tokens just stored in every layer; a model calls it once per forward."""
        if count < 0 or self._length + count > self.capacity:
            raise UserError(
                f"KVCache: cannot advance {count} tokens from {self._length}, the capacity is {self.capacity}"
            )
        self._length += count

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on; a later ``update`` overwrites them."""
        if not 0 <= length <= self._length:
            raise UserError(f"KVCache: cannot truncate to {length} tokens, the cache holds {self._length}")
        self._length = length

    def fork(self) -> KVCache:
        """A second cache with the same contents; storage is shared until one of them must overwrite."""
        other = object.__new__(KVCache)
        other.batch, other.capacity, other.block_size = self.batch, self.capacity, self.block_size
        other._attach(self._storage)
        other._length = self._length
        return other

    @staticmethod
    def gather(sequences: Sequence[tuple[KVCache, int]], capacity: int | None = None) -> KVCache:
        """A new cache whose sequence i is a copy of row ``sequences[i][1]`` of cache ``sequences[i][0]``.

        Widens a prompt to many samples, batches prompts that were prefilled alone, drops finished rows.
        All sources must hold equally many tokens. ``capacity``: default that of the first source.
        """
        first = sequences[0][0]
        if any(cache.length != first.length for cache, _ in sequences):
            raise UserError("KVCache: sequences of different lengths cannot share a cache")
        keys = first._storage.keys[0]
        wide = KVCache(
            len(first._storage.keys),
            len(sequences),
            keys.shape[2],
            keys.shape[3],
            first.capacity if capacity is None else capacity,
            dtype=keys.dtype,
            device=keys.device,
            block_size=first.block_size,
        )
        sources: dict[int, tuple[KVCache, list[int], list[int]]] = {}
        for row, (cache, source_row) in enumerate(sequences):
            _, rows, targets = sources.setdefault(id(cache), (cache, [], []))
            rows.append(source_row)
            targets.append(row)
        for cache, rows, targets in sources.values():
            _gather(cache._storage, wide._storage, rows, targets, first.length)
        wide._length = first.length
        return wide

    def _attach(self, storage: _Storage) -> None:
        self._storage = storage
        storage.readers.add(self)

    def _check(self, k: Tensor, v: Tensor, end: int) -> None:
        stored = self._storage.keys[0]
        if end > self.capacity:
            raise UserError(
                f"KVCache: {end} tokens do not fit, the cache was made for {self.capacity}; "
                "make it with a larger capacity or generate fewer tokens"
            )
        expected = (self.batch, k.shape[1], *stored.shape[2:])
        if tuple(k.shape) != expected or tuple(v.shape) != expected:
            raise UserError(f"KVCache: got k {tuple(k.shape)} and v {tuple(v.shape)}, expected {expected}")

    def _may_append_in_place(self) -> bool:
        """True when writing from ``length`` on touches no token that another reader holds."""
        storage = self._storage
        if len(storage.readers) == 1:
            return True
        writer = storage.writer and storage.writer()
        if writer is not None and writer is not self:
            return False
        return all(self._length >= other._length for other in storage.readers)

    def _own(self) -> None:
        """Make what lies past ``length`` ours to write, on a copy if need be."""
        if not self._may_append_in_place():
            storage = self._storage
            keys = storage.keys[0]
            fresh = _Storage(len(storage.keys), tuple(keys.shape), keys.dtype, keys.device)
            _copy(storage, fresh, slice(None), 0, self._length)
            storage.readers.discard(self)
            self._attach(fresh)
        if len(self._storage.readers) > 1:
            self._storage.writer = weakref.ref(self)


def _gather(source: _Storage, target: _Storage, rows: list[int], targets: list[int], length: int) -> None:
    """Copy the first ``length`` tokens of ``rows``, in every layer, to the rows ``targets`` of ``target``."""
    device = source.keys[0].device
    chosen, places = torch.tensor(rows, device=device), torch.tensor(targets, device=device)
    for old, new in zip((*source.keys, *source.values), (*target.keys, *target.values), strict=True):
        new[:, :length].index_copy_(0, places, old[:, :length].index_select(0, chosen))


def _copy(source: _Storage, target: _Storage, rows: slice, row: int, length: int) -> None:
    """Copy the first ``length`` tokens of ``rows``, in every layer, to ``target`` from ``row`` on."""
    for old, new in zip((*source.keys, *source.values), (*target.keys, *target.values), strict=True):
        part = old[rows, :length]
        new[row : row + part.shape[0], :length].copy_(part)
