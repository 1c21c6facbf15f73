"""Caches in pages: against what was stored, with pages shared and given back, and under the real GPT."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

from gptcore.errors import UserError
from gptcore.infer import KVCache, PagedKVCache, PagePool
from gptcore.infer.engine import decode_step, new_cache, new_pool, prefill
from gptcore.ops.attention import attention
from tests.infer.test_generate_gpt import FAMILIES, model_of

LAYERS, HKV, D = 2, 2, 8
TEXTS = [b"one", b"another one, longer than a page", b"two of them", b"sixteen letters."]


def pool_of(pages: int = 40, page_size: int = 4) -> PagePool:
    return PagePool(LAYERS, HKV, D, pages, page_size=page_size)


def append(cache: PagedKVCache, history: list[list[torch.Tensor]], count: int) -> None:
    """Store random tokens in every layer; attention must be that over all that each sequence of ``history`` holds."""
    for layer in range(LAYERS):
        k, v = (torch.randn(cache.batch, count, HKV, D) for _ in range(2))
        q = torch.randn(cache.batch, count, 4, D)
        for row in range(cache.batch):
            history[row][layer] = torch.cat([history[row][layer], torch.stack([k[row], v[row]])], 1)
        got = cache.attend(layer, q, k, v, causal=True)
        for row in range(cache.batch):
            keys, values = history[row][layer][:, None]
            assert torch.equal(got[row], attention(q[row : row + 1], keys, values, causal=True)[0])
    cache.advance(count)


def nothing(batch: int) -> list[list[torch.Tensor]]:
    return [[torch.empty(2, 0, HKV, D) for _ in range(LAYERS)] for _ in range(batch)]


def copied(history: list[list[torch.Tensor]], *rows: int) -> list[list[torch.Tensor]]:
    return [list(history[row]) for row in rows]


def test_a_life_of_forks_batches_and_truncations() -> None:
    """Random steps of several caches over one pool; nobody ever sees what another wrote."""
    generator, pool = random.Random(0), pool_of(400)
    alive = [(PagedKVCache(pool, 2), nothing(2))]
    for _ in range(120):
        cache, history = generator.choice(alive)
        step = generator.randrange(6)
        if step == 0 and len(alive) < 5:
            alive.append((cache.fork(), copied(history, *range(cache.batch))))
        elif step == 1 and len(alive) < 5:
            other, others = generator.choice(alive)
            rows = [generator.randrange(cache.batch) for _ in range(2)]
            row = generator.randrange(other.batch)
            mixed = PagedKVCache.gather([*((cache, i) for i in rows), (other, row)])
            alive.append((mixed, [*copied(history, *rows), *copied(others, row)]))
        elif step == 2 and len(alive) > 1:
            alive.remove((cache, history))
        elif step == 3:
            length = generator.randint(0, cache.length)
            cache.truncate(length)
            for row in history:
                row[:] = [x[:, :length] for x in row]
        else:
            append(cache, history, generator.choice([1, 1, 3, 9]))
        assert cache.lengths == [row[0].shape[1] for row in history]
    del alive, cache, history, step
    mixed = other = others = None
    gc.collect()
    assert pool.free == pool.num_pages


def test_full_pages_are_shared_and_the_last_is_copied() -> None:
    pool = pool_of()
    cache, history = PagedKVCache(pool, 1), nothing(1)
    append(cache, history, 10)  # two pages and a half
    assert pool.num_pages - pool.free == 3
    many = PagedKVCache.gather([(cache, 0)] * 5)
    assert pool.num_pages - pool.free == 3
    append(many, copied(history, *[0] * 5), 1)
    assert pool.num_pages - pool.free == 3 + 5  # the first cache keeps its half page
    del cache
    gc.collect()
    assert pool.num_pages - pool.free == 2 + 5
    assert many.block_table[:, :2].unique().numel() == 2 and many.block_table[:, 2].unique().numel() == 5


def test_the_last_to_append_to_a_page_has_it() -> None:
    pool = pool_of(4)
    cache, history = PagedKVCache(pool, 1), nothing(1)
    append(cache, history, 6)
    pair = PagedKVCache.gather([(cache, 0), (cache, 0)])
    del cache
    gc.collect()
    append(pair, copied(history, 0, 0), 2)
    assert pool.free == 1


def test_a_full_pool_says_so_and_changes_nothing() -> None:
    pool = pool_of(4)
    cache, history = PagedKVCache(pool, 2), nothing(2)
    append(cache, history, 7)
    table, k = cache.block_table, torch.randn(2, 2, HKV, D)
    with pytest.raises(
        UserError, match=r"2 more pages of 4 tokens are needed and 0 of 4 are free; make the pool"
    ):
        cache.attend(0, torch.randn(2, 2, 4, D), k, k)
    assert torch.equal(cache.block_table, table) and cache.lengths == [7, 7]
    append(cache, history, 1)
    cache.truncate(3)
    assert pool.free == 2


def test_repeated_before_advance_and_read_in_a_row() -> None:
    cache = PagedKVCache(pool_of(), 2)
    ones, q = torch.ones(2, 5, HKV, D), torch.randn(2, 5, 4, D)
    cache.attend(0, q, ones * 7, ones * 7)
    assert torch.allclose(cache.attend(0, q, ones, ones), torch.ones_like(q))
    keys, values = cache.update(1, ones * 2, ones * 3)
    assert torch.equal(keys, ones * 2) and torch.equal(values, ones * 3)
    cache.advance(5)
    keys, _ = cache.update(1, ones[:, :1], ones[:, :1])
    assert keys.shape == (2, 6, HKV, D) and bool((keys[:, :5] == 2).all())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda c: PagePool(1, 1, 8, 0), "num_pages is 0, expected at least 1"),
        (lambda c: PagedKVCache(pool_of(), 0), "batch is 0"),
        (lambda c: c.truncate(5), "cannot truncate to 5 tokens, the cache holds 4"),
        (lambda c: c.advance(1), "cannot advance 1 tokens, 0 were stored"),
        (lambda c: c.update(0, *[torch.zeros(2, 1, HKV, D)] * 2), "different lengths"),
        (lambda c: c.attend(0, *[torch.zeros(2, 1, 3, D)] * 3), "expected \\(2, 1, 2, 8\\)"),
        (lambda c: PagedKVCache.gather([(c, 0), (PagedKVCache(pool_of(), 1), 0)]), "different pools"),
        (lambda c: PagedKVCache.gather([]), "no sequences"),
    ],
)
def test_errors_are_sentences(call: Any, sentence: str) -> None:
    pool = pool_of()
    long, short = PagedKVCache(pool, 1), PagedKVCache(pool, 1)
    append(long, nothing(1), 4)
    append(short, nothing(1), 2)
    with pytest.raises(UserError, match=sentence):
        call(PagedKVCache.gather([(long, 0), (short, 0)]))


def greedy(model: Any, cache: KVCache | PagedKVCache, logits: torch.Tensor, count: int) -> list[list[int]]:
    """What each sequence says next, and the logits' bits on the way."""
    said: list[list[int]] = [[] for _ in range(len(logits))]
    for _ in range(count):
        tokens = logits.argmax(-1).tolist()
        for row, token in zip(said, tokens, strict=True):
            row.append(token)
        logits = decode_step(model, tokens, cache)
    return said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_different_lengths_are_decoded_together(family: str, dtype: torch.dtype) -> None:
    """Each says what it says alone in a cache of its own, and its logits have the same bits."""
    model = model_of(family, dtype)
    pool = new_pool(model, 40, page_size=4)
    with torch.inference_mode():
        alone, caches, firsts = [], [], []
        for text in TEXTS:
            cache = new_cache(model, 1, 48)
            alone.append((cache, prefill(model, list(text), cache)))
            paged = PagedKVCache(pool, 1)
            firsts.append(prefill(model, list(text), paged))
            caches.append(paged)
            assert torch.equal(firsts[-1], alone[-1][1])
        together = PagedKVCache.gather([(cache, 0) for cache in caches])
        said = greedy(model, together, torch.cat(firsts), 12)
        assert said == [greedy(model, cache, logits, 12)[0] for cache, logits in alone]
        step = decode_step(model, [1, 2, 3, 4], together)
        for row, (cache, _) in enumerate(alone):
            assert torch.equal(step[row : row + 1], decode_step(model, [row + 1], cache))
        assert together.lengths == [len(text) + 13 for text in TEXTS]
