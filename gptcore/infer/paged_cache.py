"""Keys and values in pages that caches of any length share, so that memory follows what was said, not what might be.

A ``PagePool`` holds the pages of every layer. A ``PagedKVCache`` is B sequences, each a list of pages and a length of
its own; attention reads the pages where they lie (``gptcore.ops.attention_paged``). Forks and batches put together from
other caches share pages; only the last, half-full page of a sequence is copied, when somebody appends to it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptcore import ops
from gptcore.errors import UserError
from gptcore.infer.kv_cache import check_sizes


class PagePool:
    """Pages of keys and values for the layers of one model, and which of them are in use.

    num_layers, num_kv_heads (Hkv), head_dim (D): of the model.
    num_pages: how many pages there are. page_size: tokens in each. Default 16.
    dtype, device: of keys and values, as the model computes them.
    Raises UserError when a size is not positive.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        *,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_sizes(
            "PagePool", num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, num_pages=num_pages,
            page_size=page_size,
        )  # fmt: skip
        self.page_size, self.num_pages = page_size, num_pages
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._owners = [0] * num_pages  # sequences that hold each page
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, whether in use or not."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def owners(self, page: int) -> int:
        """How many sequences hold ``page``."""
        return self._owners[page]

    def pages_for(self, tokens: int) -> int:
        """How many pages so many tokens of a sequence fill, the last perhaps in part."""
        return -(-tokens // self.page_size)

    def take(self) -> int:
        """A page that nobody held. Raises UserError when there is none."""
        self.require(1)
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def require(self, count: int) -> None:
        """Raises UserError unless so many pages are free."""
        if count > self.free:
            raise UserError(
                f"PagePool: {count} more pages of {self.page_size} tokens are needed and {self.free} of "
                f"{self.num_pages} are free; make the pool larger, or let go of caches that are done"
            )

    def share(self, pages: Sequence[int]) -> None:
        """One more sequence holds each of ``pages``."""
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One sequence less holds each of ``pages``."""
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """The contents of the first of each pair to the second, in every layer."""
        if not pages:
            return
        device = self.keys[0].device
        sources, targets = torch.tensor(pages, device=device).unbind(1)
        for x in (*self.keys, *self.values):
            x.index_copy_(0, targets, x.index_select(0, sources))


class PagedKVCache:
    """Keys and values of ``batch`` sequences, each of its own length, in pages of ``pool``.

    Pages go back to the pool with ``truncate``, and all of them when the cache is dropped.
    """

    lengths: list[int]
    _device: torch.device
    _stored: int  # tokens a sequence that a forward has stored, but not counted
    _table: Tensor | None  # block_table, until pages change

    def __init__(self, pool: PagePool, batch: int) -> None:
        check_sizes("PagedKVCache", batch=batch)
        self._attach(pool, [[] for _ in range(batch)], [0] * batch)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, not counting a forward that has not called ``advance`` yet."""
        return max(self.lengths)

    @property
    def block_table(self) -> Tensor:
        """(B, pages) int32 on the pool's device: page j of sequence b; 0 behind its last."""
        if self._table is None:
            width = max(map(len, self._pages))
            rows = [[*pages, *[0] * (width - len(pages))] for pages in self._pages]
            self._table = torch.tensor(rows, dtype=torch.int32).view(self.batch, width).to(self._device)
        return self._table

    def positions(self, count: int) -> int | Tensor:
        """Where the next ``count`` tokens stand: the first one's place, or (B, count) int32 where lengths differ."""
        if min(self.lengths) == self.length:
            return self.length
        first = torch.tensor(self.lengths, dtype=torch.int32)[:, None]
        return (first + torch.arange(count, dtype=torch.int32)).to(self._device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Store k, v (B, T, Hkv, D) behind each sequence, and return what q (B, T, H, D) finds there.

        options: those of ``gptcore.ops.attention_paged``. Repeating a call before ``advance`` overwrites the same
        places. Raises UserError when the pool has too few pages or a shape is not the cache's; nothing is written then.
        """
        self._store(layer, k, v)
        pool = self._pool
        out: Tensor = ops.attention_paged(
            q, pool.keys[layer], pool.values[layer], self.block_table, self._ends, **options
        )
        return out

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As ``KVCache.update``, for who cannot read pages: returns copies, and wants sequences of equal length."""
        if min(self.lengths) != self.length:
            raise UserError(
                "PagedKVCache: sequences of different lengths have no keys of one shape; use attend"
            )
        self._store(layer, k, v)
        end, table = self.length + k.shape[1], self.block_table.long()
        keys, values = (x[table].flatten(1, 2)[:, :end] for x in self._layer(layer))
        return keys, values

    def advance(self, count: int) -> None:
        """Count the T tokens just stored in every layer; a model calls it once per forward."""
        if count != self._stored:
            raise UserError(f"PagedKVCache: cannot advance {count} tokens, {self._stored} were stored")
        self.lengths = [length + count for length in self.lengths]
        self._stored = 0

    def truncate(self, length: int) -> None:
        """Forget the tokens of every sequence from ``length`` on, and give back pages that only they filled."""
        if not 0 <= length <= self.length:
            raise UserError(
                f"PagedKVCache: cannot truncate to {length} tokens, the cache holds {self.length}"
            )
        self.lengths = [min(length, own) for own in self.lengths]
        for pages, own in zip(self._pages, self.lengths, strict=True):
            used = self._pool.pages_for(own)
            self._pool.release(pages[used:])
            del pages[used:]
        self._stored, self._table = 0, None

    def fork(self) -> PagedKVCache:
        """A second cache with the same contents, in the same pages."""
        return self.gather([(self, row) for row in range(self.batch)])

    @staticmethod
    def gather(sequences: Sequence[tuple[PagedKVCache, int]]) -> PagedKVCache:
        """A new cache whose sequence i is row ``sequences[i][1]`` of cache ``sequences[i][0]``, in the same pages.

        Widens a prompt to many samples, batches prompts that were prefilled alone, drops finished rows: of any lengths,
        and nothing is copied. Raises UserError for caches of different pools.
        """
        if not sequences:
            raise UserError("PagedKVCache: a batch of no sequences")
        pool = sequences[0][0]._pool
        if any(cache._pool is not pool for cache, _ in sequences):
            raise UserError("PagedKVCache: sequences of different pools cannot share a cache")
        lengths = [cache.lengths[row] for cache, row in sequences]
        pages = [cache._pages[row][: pool.pages_for(cache.lengths[row])] for cache, row in sequences]
        for held in pages:
            pool.share(held)
        other = object.__new__(PagedKVCache)
        other._attach(pool, pages, lengths)
        return other

    def _attach(self, pool: PagePool, pages: list[list[int]], lengths: list[int]) -> None:
        self._pool, self._pages, self.lengths = pool, pages, lengths
        self._device = pool.keys[0].device
        self._stored, self._table = 0, None
        self._place(0)
        weakref.finalize(self, _release_all, pool, pages).atexit = False

    def _layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._pool.keys[layer], self._pool.values[layer]

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        pool_keys, pool_values = self._layer(layer)
        expected = (self.batch, k.shape[1], *pool_keys.shape[2:])
        if tuple(k.shape) != expected or tuple(v.shape) != expected:
            raise UserError(
                f"PagedKVCache: got k {tuple(k.shape)} and v {tuple(v.shape)}, expected {expected}"
            )
        if k.shape[1] != self._stored:
            self._make_room(k.shape[1])
        for x, new in ((pool_keys, k), (pool_values, v)):
            x.flatten(0, 1).index_copy_(0, self._places, new.flatten(0, 1).to(x.dtype))

    def _make_room(self, count: int) -> None:
        """Pages of our own for ``count`` tokens behind each sequence: where they go is the same in every layer."""
        pool, size = self._pool, self._pool.page_size
        needed = [
            pool.pages_for(length + count) - len(pages)
            for length, pages in zip(self.lengths, self._pages, strict=True)
        ]
        halves = [row for row, length in enumerate(self.lengths) if count and length % size]
        writers = Counter(self._pages[row][self.lengths[row] // size] for row in halves)
        # The last to write a page that only they hold may have it.
        copies = sum(n if pool.owners(page) > n else n - 1 for page, n in writers.items())
        pool.require(copies + sum(max(n, 0) for n in needed))
        copied = []
        for row in halves:
            block = self.lengths[row] // size
            page = self._pages[row][block]
            if pool.owners(page) > 1:
                self._pages[row][block] = pool.take()
                copied.append((page, self._pages[row][block]))
                pool.release([page])
        pool.copy(copied)
        for pages, more in zip(self._pages, needed, strict=True):
            pages.extend(pool.take() for _ in range(more))
        self._stored, self._table = count, None
        self._place(count)

    def _place(self, count: int) -> None:
        size = self._pool.page_size
        places = [
            pages[at // size] * size + at % size
            for length, pages in zip(self.lengths, self._pages, strict=True)
            for at in range(length, length + count)
        ]
        self._places = torch.tensor(places, dtype=torch.int64).to(self._device)
        ends = [length + count for length in self.lengths]
        self._ends = torch.tensor(ends, dtype=torch.int32).to(self._device)


def _release_all(pool: PagePool, pages: list[list[int]]) -> None:
    for held in pages:
        pool.release(held)
