"""Attention over a cache in pages: against float64, and bit for bit the same as over keys in a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from gptcore import ops
from gptcore.ops.attention import attention, option_values
from gptcore.ops.attention_paged import attention_paged, attention_paged_reference
from tests.cuda.attention_cases import STEP
from tests.tolerance import assert_same_for_threads, same_bits

CPU_DTYPES, CUDA_DTYPES = [torch.float32, torch.bfloat16], [torch.float32, torch.bfloat16, torch.float16]


class Cache(NamedTuple):
    """Pages of keys and values, whose places that no sequence covers are not a number."""

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor

    def in_row(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of one sequence, one after the other."""
        length, size = int(self.lengths[sequence]), self.k.shape[1]
        pages = self.table[sequence, : -(-length // size)].long()
        k, v = (x[pages].flatten(0, 1)[:length].contiguous() for x in (self.k, self.v))
        return k, v


def cached(
    lengths: list[int], kv_heads: int, size: int, dtype: torch.dtype, *, page_size: int = 16, spare: int = 3
) -> Cache:
    """Sequences in shuffled pages; the table has room for more, of which its entries lead to nowhere."""
    counts = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(counts) + spare).int()
    table = torch.full((len(lengths), max(counts) + 2), -7, dtype=torch.int32)
    k, v = (
        torch.full((sum(counts) + spare, page_size, kv_heads, size), torch.nan, dtype=dtype) for _ in range(2)
    )
    first = 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        table[row, :count] = order[first : first + count]
        for place in range(length):
            page = int(table[row, place // page_size])
            k[page, place % page_size] = torch.randn(kv_heads, size).to(dtype)
            v[page, place % page_size] = torch.randn(kv_heads, size).to(dtype)
        first += count
    return Cache(k, v, table, torch.tensor(lengths, dtype=torch.int32))


def queries(cache: Cache, tokens: int, heads: int) -> torch.Tensor:
    return torch.randn(len(cache.lengths), tokens, heads, cache.k.shape[3]).to(cache.k.dtype)


def check(cache: Cache, tokens: int, heads: int, **options: Any) -> None:
    """Output and lse into poisoned memory, against float64."""
    q = queries(cache, tokens, heads)
    out = torch.full_like(q, torch.nan)
    got, lse = attention_paged(q, *cache, **options, return_lse=True, out=out)
    doubles = q.double(), cache.k.double(), cache.v.double(), cache.table, cache.lengths
    exact, exact_lse = attention_paged_reference(*doubles, **options, return_lse=True)
    largest = cache.v.double().nan_to_num(0.0).abs().max().item()
    assert got is out and (got.double() - exact).abs().max().item() <= STEP[q.dtype] * largest
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    # bf16 takes the processor's short polynomial (1.0e-4).
    bound = (2e-5 if q.dtype == torch.float32 else 1.5e-4) * max(1.0, exact_lse[seen].abs().max().item())
    assert (lse[seen].double() - exact_lse[seen]).abs().max().item() <= bound


def types_of(isa: str) -> list[torch.dtype]:
    return CUDA_DTYPES if isa in ("simt", "cuda") else CPU_DTYPES


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_matches_float64_at_every_border_of_pages(isa: str, tokens: int) -> None:
    for dtype in types_of(isa):
        check(cached([1, 15, 16, 17, 31, 32, 33, 80], 2, 40, dtype), tokens, 4, causal=True)


@pytest.mark.parametrize("page_size", [1, 3, 16, 48, 64, 100])
def test_any_page_size(isa: str, page_size: int) -> None:
    for dtype in types_of(isa):
        check(cached([70, 1, 129], 1, 32, dtype, page_size=page_size), 1, 2, causal=True)
        check(cached([66], 1, 32, dtype, page_size=page_size), 6, 1, causal=True)


@pytest.mark.parametrize("size", [8, 33, 64, 128, 160, 256])
def test_every_head_size(isa: str, size: int) -> None:
    for dtype in types_of(isa):
        check(cached([67, 20], 1, size, dtype), 1, 3)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"softmax_scale": 0.4},
        {"softmax_scale": -0.3},
        {"soft_cap": 2.0},
        {"alibi": 1},
        {"alibi": 2},
        {"sinks": True},
        {"window_size": (20, 0)},
        {"window_size": (5, 1)},
        {"causal": False},
    ],
    ids=str,
)
def test_every_option(isa: str, tokens: int, options: dict[str, Any]) -> None:
    options, heads, lengths = {"causal": True, **options}, 6, [90, 3, 41]
    if batched := options.pop("alibi", 0):
        options["alibi_slopes"] = torch.rand(3, heads) if batched == 2 else torch.rand(heads)
    if options.pop("sinks", False):
        options["sinks"] = torch.tensor([0.5, -torch.inf, 3.0, -2.0, 9.0, 0.0])
    for dtype in types_of(isa):
        check(cached(lengths, 2, 32, dtype), tokens, heads, **options)


def test_chunks_of_a_prompt(isa: str) -> None:
    """More queries than decoding has, keys of their own and of those before them."""
    for dtype in types_of(isa):
        check(cached([70, 37], 2, 32, dtype), 37, 4, causal=True)
        check(cached([150], 1, 16, dtype), 33, 2, causal=True, window_size=(20, 0))


def test_sequences_without_keys_and_queries_that_see_none(isa: str) -> None:
    cache = cached([0, 2, 30], 1, 16, torch.float32)
    q = queries(cache, 4, 2)
    out, lse = attention_paged(q, *cache, causal=True, return_lse=True)
    assert not out[0].any() and lse[0].isneginf().all()
    assert not out[1, :2].any() and lse[1, :, :2].isneginf().all() and lse[1, :, 2:].isfinite().all()
    _, lse = attention_paged(q, *cache, causal=True, sinks=torch.tensor([1.0, -2.0]), return_lse=True)
    assert torch.allclose(lse[0], torch.tensor([1.0, -2.0])[:, None].expand(2, 4))


@pytest.mark.parametrize("tokens", [1, 3])
def test_same_bits_as_keys_in_a_row(isa: str, tokens: int) -> None:
    """Whatever the pages, the other sequences and the table's length: 300 keys are two of a GPU's parts."""
    options: dict[str, Any] = {"causal": True, "window_size": (280, 0), "soft_cap": 20.0}
    for dtype in types_of(isa):
        for page_size in (16, 20):
            cache = cached([300, 64, 5], 2, 64, dtype, page_size=page_size)
            q = queries(cache, tokens, 4)
            got, lse = attention_paged(q, *cache, **options, return_lse=True)
            for b in range(3):
                k, v = cache.in_row(b)
                row, row_lse = attention(q[b : b + 1], k[None], v[None], **options, return_lse=True)
                assert same_bits(got[b : b + 1], row) and same_bits(lse[b : b + 1], row_lse)


def test_same_bits_in_every_run_and_however_long_the_table(isa: str, threads: None) -> None:
    for dtype in types_of(isa):
        cache = cached([130, 17, 64, 1], 2, 32, dtype)
        for tokens in (1, 9):
            q = queries(cache, tokens, 4)
            once = attention_paged(q, *cache, causal=True)
            counts = (1, 2, 4) if isa not in ("simt", "cuda") else (1,)
            assert_same_for_threads(lambda: [attention_paged(q, *cache, causal=True)], counts=counts)  # noqa: B023
            longer = torch.full((4, 70), 1 << 30, dtype=torch.int32)
            longer[:, : cache.table.shape[1]] = cache.table
            assert same_bits(attention_paged(q, *cache._replace(table=longer), causal=True), once)


def test_views_of_a_wider_cache(isa: str) -> None:
    """Keys and values side by side, a table and queries that are views."""
    cache = cached([40, 33], 2, 32, torch.float32)
    both = torch.stack([cache.k, cache.v], 1)
    wide = torch.full((2, 2 * cache.table.shape[1]), -1, dtype=torch.int32)
    wide[:, : cache.table.shape[1]] = cache.table
    q = torch.randn(2, 1, 3, 8, 32)[:, :, 1, 2:6]
    got = attention_paged(q, both[:, 0], both[:, 1], wide[:, : cache.table.shape[1]], cache.lengths)
    assert same_bits(got, attention_paged(q.contiguous(), *cache))


def test_numpy_arrays(isa: str) -> None:
    if isa == "cuda":
        pytest.skip("NumPy arrays lie on the CPU")
    cache = cached([40, 33], 2, 32, torch.float32)
    q = queries(cache, 2, 4)
    out, lse = attention_paged(q.numpy(), *(x.numpy() for x in cache), causal=True, return_lse=True)
    expected, expected_lse = attention_paged(q, *cache, causal=True, return_lse=True)
    assert same_bits(torch.from_numpy(out), expected) and same_bits(torch.from_numpy(lse), expected_lse)


def test_what_lies_on_another_device_is_never_followed_out_of_bounds(isa: str) -> None:
    """There the tables are not read by the host: lengths are cut to the room, pages to those there are."""
    if isa not in ("simt", "cuda"):
        pytest.skip("the processor refuses them")
    cache = cached([40, 33], 1, 32, torch.float32)
    k, v = cache.k.nan_to_num(1.0), cache.v.nan_to_num(1.0)
    table = torch.tensor([[1 << 30, -5, 2], [0, 1, 2]], dtype=torch.int32)
    lengths = torch.tensor([1 << 30, -4], dtype=torch.int32)
    q = queries(cache, 1, 2)
    got = attention_paged(q, k, v, table, lengths)
    near, fitting = torch.tensor([[len(k) - 1, 0, 2], [0, 1, 2]]), torch.tensor([48, 0])
    assert same_bits(got, attention_paged(q, k, v, near.int(), fitting.int()))
    assert not got[1].any()


def test_without_pages_without_blocks_and_without_sequences(isa: str) -> None:
    none = torch.zeros(2, 0, dtype=torch.int32)
    empty = torch.zeros(2, dtype=torch.int32)
    pages = torch.zeros(0, 16, 1, 8)
    for table in (none, torch.zeros(2, 3, dtype=torch.int32)):
        assert not attention_paged(torch.randn(2, 1, 2, 8), pages, pages, table, empty).any()
    q = torch.randn(0, 1, 2, 8)
    assert attention_paged(q, pages, pages, none[:0], empty[:0]).shape == q.shape


def test_errors_before_anything_is_written() -> None:
    cache = cached([40, 33], 2, 32, torch.float32)
    q = queries(cache, 1, 4)
    out = torch.full_like(q, 7.0)

    def refused(match: str, error: type[Exception] = ValueError, **changed: Any) -> None:
        arguments = {"q": q, "k_pages": cache.k, "v_pages": cache.v}
        arguments |= {"block_table": cache.table, "cache_seqlens": cache.lengths, **changed}
        with pytest.raises(error, match=match):
            attention_paged(**arguments, out=out)
        assert (out == 7.0).all()

    beyond, below = cache.table.clone(), cache.table.clone()
    beyond[1, 2], below[0, 0] = len(cache.k), -1
    refused(r"'block_table': got page \d+ at \(1, 2\), expected 0 to the number", block_table=beyond)
    refused(r"'block_table': got page -1 at \(0, 0\)", block_table=below)
    refused(
        "'cache_seqlens': got 81 at position 1, expected 0 to blocks",
        cache_seqlens=torch.tensor([1, 81]).int(),
    )
    refused("'cache_seqlens': got -1 at position 0", cache_seqlens=torch.tensor([-1, 1]).int())
    refused("'cache_seqlens'", cache_seqlens=torch.zeros(3).int())
    refused("'cache_seqlens'", TypeError, cache_seqlens=torch.zeros(2).long())
    refused("'block_table'", TypeError, block_table=cache.table.long())
    refused("'block_table'", block_table=cache.table[:1])
    refused("'block_table'", block_table=cache.table[0])
    refused("'k_pages'", k_pages=cache.k[0])
    refused("'k_pages'", TypeError, k_pages=cache.k.bfloat16())
    refused("'v_pages'", v_pages=cache.v[:-1])
    refused("'v_pages'", v_pages=cache.v.transpose(1, 3))
    three = cache.k.repeat(1, 1, 2, 1)[:, :, :3]
    refused("'k_pages': got 3 heads, expected a divisor", k_pages=three, v_pages=three)
    refused("'q': got", q=q[0])
    refused("'k_pages': got pages of 0 tokens", k_pages=cache.k[:, :0], v_pages=cache.v[:, :0])
    refused("'sinks'", sinks=torch.zeros(3))
    with pytest.raises(TypeError, match="attn_mask"):
        attention_paged(q, *cache, attn_mask=torch.ones(1, 40).bool())  # type: ignore[call-arg]


def test_is_an_op_of_torch_and_has_no_gradient() -> None:
    cache = cached([40, 33], 2, 32, torch.float32)
    q = queries(cache, 2, 4)
    values = (*option_values("attention_paged", q, 32, {"causal": True}), True)
    torch.library.opcheck(torch.ops.gptcore.attention_paged.default, (q, *cache, *values))
    compiled = torch.compile(
        lambda q: ops.attention_paged(q * 2, *cache, causal=True), fullgraph=True, backend="aot_eager"
    )
    assert same_bits(compiled(q), ops.attention_paged(q * 2, *cache, causal=True))
    wanted = q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="attention_paged has no derivative"):
        ops.attention_paged(wanted, *cache).sum().backward()
    with pytest.raises(RuntimeError, match="out= does not support"):
        ops.attention_paged(wanted, *cache, out=torch.empty_like(q))
