"""The KV cache against a plain list of what was stored, including sharing between forks."""

import pytest
import torch

from gptcore.errors import UserError
from gptcore.infer import KVCache

LAYERS, HKV, D = 3, 2, 4


def make(batch=2, capacity=40):
    return KVCache(LAYERS, batch, HKV, D, capacity, block_size=8)


def append(cache, history, count, generator):
    """Store ``count`` random tokens in every layer and check that everything stored so far comes back."""
    new = []
    for layer in range(LAYERS):
        k, v = (torch.randn(cache.batch, count, HKV, D, generator=generator) for _ in range(2))
        keys, values = cache.update(layer, k, v)
        new.append((k, v))
        for got, part in ((keys, 0), (values, 1)):
            want = torch.cat([step[layer][part] for step in history] + [(k, v)[part]], 1)
            assert torch.equal(got, want)
    cache.advance(count)
    return [*history, new]


def test_what_was_stored_comes_back_without_new_memory():
    cache, generator, history = make(), torch.Generator().manual_seed(0), []
    addresses = {t.data_ptr() for t in cache._storage.keys}
    for count in (5, 1, 1, 3, 0, 1):
        history = append(cache, history, count, generator)
    assert cache.length == 11
    zero = torch.zeros(2, 1, HKV, D)
    assert {cache.update(layer, zero, zero)[0].data_ptr() for layer in range(LAYERS)} == addresses
    assert cache.nbytes == 2 * LAYERS * 2 * 40 * HKV * D * 4


def test_update_before_advance_may_be_repeated():
    cache = make()
    ones = torch.ones(2, 1, HKV, D)
    cache.update(0, ones * 5, ones)
    keys, _ = cache.update(0, ones, ones)
    assert keys.shape == (2, 1, HKV, D) and bool((keys == 1).all())


@pytest.mark.parametrize("first", ["parent", "child"])
def test_forks_share_and_never_see_each_other(first):
    generator = torch.Generator().manual_seed(1)
    parent = make()
    base = append(parent, [], 9, generator)
    child = parent.fork()
    assert child._storage is parent._storage
    order = [(parent, base), (child, base)]
    if first == "child":
        order.reverse()
    histories = []
    for cache, history in order:
        for count in (1, 1, 2):
            history = append(cache, history, count, generator)
        histories.append((cache, history))
    assert child._storage is not parent._storage
    for cache, history in histories:
        append(cache, history, 1, generator)


def test_many_forks_with_truncation_random_walk():
    """Any interleaving of append, fork, truncate and drop gives each cache its own history."""
    generator = torch.Generator().manual_seed(2)
    live = [(make(capacity=60), [])]
    for step in range(150):
        index = int(torch.randint(len(live), (1,), generator=generator))
        cache, history = live[index]
        action = step % 5
        if action in (0, 1) and cache.length < 50:
            live[index] = (cache, append(cache, history, 1 + action, generator))
        elif action == 2 and len(live) < 6:
            live.append((cache.fork(), list(history)))
        elif action == 3 and history:
            cache.truncate(cache.length - history[-1][0][0].shape[1])
            live[index] = (cache, history[:-1])
        elif action == 4 and len(live) > 3:
            live.pop(index)
    assert any(cache.length > 5 for cache, _ in live)
    for cache, history in live:
        append(cache, history, 1, generator)


def test_truncating_the_writer_below_a_fork_does_not_overwrite_the_fork():
    generator = torch.Generator().manual_seed(3)
    parent = make()
    base = append(parent, [], 4, generator)
    base = append(parent, base, 4, generator)
    child = parent.fork()
    parent.truncate(4)
    append(parent, base[:1], 2, generator)
    append(child, base, 1, generator)


def test_gather_picks_rows_of_several_caches():
    generator = torch.Generator().manual_seed(4)
    one, two = make(batch=1), make(batch=2)
    first, second = append(one, [], 6, generator), append(two, [], 6, generator)
    wide = KVCache.gather([(two, 1), (one, 0), (one, 0)], capacity=9)
    assert (wide.batch, wide.length, wide.capacity) == (3, 6, 9)
    history = [
        [
            tuple(torch.cat([b[1:2], a, a]) for a, b in zip(of_one, of_two, strict=True))
            for of_one, of_two in zip(first[0], second[0], strict=True)
        ]
    ]
    append(wide, history, 2, generator)
    append(one, first, 1, generator)
    two.truncate(5)
    with pytest.raises(UserError, match="different lengths"):
        KVCache.gather([(one, 0), (two, 0)])


def test_block_table_finds_every_token():
    cache, generator = make(batch=3), torch.Generator().manual_seed(5)
    history = append(cache, [], 19, generator)
    table = cache.block_table
    assert table.dtype == torch.int32 and table.shape == (3, 3)  # 19 tokens in pages of 8
    keys, values = cache.pages(1)
    for got, part in ((keys, 0), (values, 1)):
        through_table = got[table.long()].reshape(3, 24, HKV, D)[:, :19]
        assert torch.equal(through_table, history[0][1][part])


def test_errors_say_what_was_wrong_and_leave_the_cache_alone():
    cache, generator = make(capacity=10), torch.Generator().manual_seed(6)
    history = append(cache, [], 8, generator)
    kv = torch.zeros(2, 3, HKV, D)
    with pytest.raises(UserError, match="11 tokens do not fit, the cache was made for 10"):
        cache.update(0, kv, kv)
    with pytest.raises(UserError, match="expected \\(2, 1, 2, 4\\)"):
        cache.update(0, torch.zeros(1, 1, HKV, D), torch.zeros(2, 1, HKV, D))
    with pytest.raises(UserError, match="cannot truncate to 9"):
        cache.truncate(9)
    with pytest.raises(UserError, match="cannot advance 3"):
        cache.advance(3)
    with pytest.raises(UserError, match="capacity is 0"):
        KVCache(1, 1, 1, 1, 0)
    append(cache, history, 2, generator)
