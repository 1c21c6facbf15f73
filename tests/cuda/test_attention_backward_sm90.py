"""Attention's backward as Hopper runs it: gradients against float64, their bits, and the launcher's arithmetic."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from gptcore.ops.attention import (
    attention,
    attention_backward,
    attention_qkv,
    attention_qkv_backward,
    attention_reference,
)
from tests.tolerance import same_bits

# What a gradient may be off, as a share of the largest: it is rounded, so are out, P and dS within the sums.
STEP = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
# B, T, S, H, Hkv: parts of tiles and more than one, T != S both ways, a group of heads.
SHAPES = [(1, 70, 150, 2, 1), (1, 150, 70, 1, 1)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "left window": {"causal": True, "window_size": (70, -1)},
    "anticausal": {"window_size": (-1, 30)},
    "scale": {"softmax_scale": -0.05, "causal": True},
    "soft cap": {"soft_cap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": [0.5, 0.1]},
    "dropout": {"dropout_p": 0.3, "seed": 7, "offset": 5, "causal": True},
    "all": {
        "soft_cap": 3.0,
        "alibi_slopes": [0.5, 0.1],
        "dropout_p": 0.1,
        "seed": -3,
        "window_size": (60, 9),
    },
}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are written into memory full of NaN."""
    monkeypatch.setattr(
        sys.modules["gptcore.ops.attention"], "empty_like", lambda x, *a, **k: torch.full_like(x, torch.nan)
    )


def tensors_of(shape: tuple[int, ...], size: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    batch, queries, keys, heads, kv_heads = shape
    counts = ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    return [torch.randn(batch, tokens, count, size).to(dtype) for tokens, count in counts]


def options_of(name: str, heads: int) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"][:heads])
    return options


def gradients(tensors: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
    q, k, v, dout = tensors
    with torch.no_grad():
        out, lse = attention(q, k, v, return_lse=True, **options)
    return attention_backward(dout, q, k, v, out, lse, **options)


def exact_gradients(tensors: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    return torch.autograd.grad(attention_reference(*leaves, **options), leaves, tensors[3].double())


def assert_close(got: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> None:
    for name, a, b in zip("qkv", got, exact, strict=True):
        error, bound = (a.double() - b).abs().max().item(), STEP[a.dtype] * b.abs().max().item()
        assert error <= bound, f"gradient of {name}: error {error:.3e} exceeds {bound:.3e}"


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matches_float64_sm90(sm90: ModuleType, poisoned: None, name: str, size: int) -> None:
    for shape in SHAPES:
        options = options_of(name, shape[3])
        tensors = tensors_of(shape, size)
        assert_close(gradients(tensors, **options), exact_gradients(tensors, **options))
        assert "backward_sm90" in sm90.last_kernel()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", ["causal", "all"])
def test_half_precision_matches_float64_sm90(sm90: ModuleType, poisoned: None, name: str, size: int) -> None:
    tensors, options = tensors_of(SHAPES[0], size, torch.float16), options_of(name, 2)
    assert_close(gradients(tensors, **options), exact_gradients(tensors, **options))


@pytest.mark.parametrize("size", [64, 128])
def test_a_lone_key_gives_scores_no_gradient_sm90(sm90: ModuleType, poisoned: None, size: int) -> None:
    tensors = tensors_of((1, 1, 1, 1, 1), size)
    dq, dk, dv = gradients(tensors)
    assert torch.equal(dv, tensors[3])  # P is 1
    # dP - delta is the rounding of out, of sums of the size of |dout| |v|.
    norms = [x.double().norm().item() for x in tensors]
    bound = 2.0**-9 * norms[3] * norms[2] * size**-0.5
    assert dq.abs().max().item() <= bound * norms[1] and dk.abs().max().item() <= bound * norms[0]


def test_queries_and_keys_outside_the_mask_get_zero_sm90(sm90: ModuleType, poisoned: None) -> None:
    tensors = tensors_of((1, 210, 130, 1, 1), 128)
    dq, dk, dv = gradients(tensors, causal=True)
    assert not dq[:, :80].any() and dq[:, 81:].any(-1).all()
    tensors = tensors_of((1, 70, 400, 1, 1), 64)
    dq, dk, dv = gradients(tensors, causal=True, window_size=(20, -1))
    assert not dk[:, :310].any() and not dv[:, :310].any() and dv[:, 310:].any(-1).all()


@pytest.mark.parametrize("size", [64, 128])
def test_every_run_has_the_same_bits_sm90(sm90: ModuleType, poisoned: None, size: int) -> None:
    # Each run of the emulator takes threads in another order. More blocks than the three multiprocessors it has.
    tensors, options = tensors_of((1, 140, 390, 2, 1), size), options_of("dropout", 2)
    first, *others = (gradients(tensors, **options) for _ in range(3))
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


def test_gradients_of_lse_and_sinks_sm90(sm90: ModuleType, poisoned: None) -> None:
    q, k, v, dout = tensors_of((2, 20, 40, 4, 2), 128)
    sinks, dlse = torch.randn(4), torch.randn(2, 4, 20)
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
    got = attention_backward(dout, q, k, v, out, lse, dlse=dlse, sinks=sinks)
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    exact = torch.autograd.grad(
        attention_reference(*leaves[:3], sinks=leaves[3], return_lse=True),
        leaves,
        (dout.double(), dlse.double()),
    )
    assert_close(got[:3], exact[:3])
    assert (got[3].double() - exact[3]).abs().max().item() <= 2.0**-8 * exact[3].abs().max().item()


def test_views_of_a_fused_projection_sm90(sm90: ModuleType, poisoned: None) -> None:
    q, k, v, dout = tensors_of((2, 40, 40, 4, 2), 64)
    qkv = torch.cat([q, k, v], 2).flatten(2)
    out, lse = attention_qkv(qkv, 4, 2, causal=True, return_lse=True)
    fused = attention_qkv_backward(dout.flatten(2), qkv, out, lse, 4, 2, causal=True)
    parts = gradients([q, k, v, dout], causal=True)
    assert same_bits(fused[0], torch.cat(parts, 2).flatten(2))


def test_nan_stays_in_its_sequence_and_head_sm90(sm90: ModuleType, poisoned: None) -> None:
    tensors = tensors_of((2, 60, 80, 4, 2), 128)
    clean = gradients(tensors, causal=True)
    tensors[0][0, 50, 3] = torch.nan
    got = gradients(tensors, causal=True)
    assert got[0][0, 50, 3].isnan().all()
    for a, b, head in zip(got, clean, (3, 1, 1), strict=True):
        assert a[0, :, head].isnan().any()
        a[0, :, head] = b[0, :, head]
        assert same_bits(a, b)


# --- packed documents and prefixes ------------------------------------------------------------------------------

# No queries, no keys, one token, whole tiles, fewer queries than keys and more.
LENGTHS_Q, LENGTHS_K = [5, 70, 0, 64, 1, 128, 90], [8, 150, 20, 0, 1, 128, 7]


def documents(
    lengths_q: list[int], lengths_k: list[int], heads: int, kv_heads: int, size: int
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """q, k, v and dout, packed, and what tells the documents apart."""
    shape = (1, sum(lengths_q), sum(lengths_k), heads, kv_heads)
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(x)]).int() for x in (lengths_q, lengths_k))
    return [x[0] for x in tensors_of(shape, size)], {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


def places(cu: dict[str, torch.Tensor], i: int) -> tuple[slice, slice]:
    """Tokens of document ``i`` among queries and among keys."""
    return slice(*cu["cu_seqlens_q"][i : i + 2].tolist()), slice(*cu["cu_seqlens_k"][i : i + 2].tolist())


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 5), "soft_cap": 2.0}])
def test_documents_have_the_bits_they_have_alone_sm90(
    sm90: ModuleType, poisoned: None, size: int, options: dict[str, Any]
) -> None:
    (q, k, v, dout), cu = documents(LENGTHS_Q, LENGTHS_K, 2, 1, size)
    out, lse = attention(q, k, v, return_lse=True, **cu, **options)
    got = attention_backward(dout, q, k, v, out, lse, **cu, **options)
    assert "backward_sm90" in sm90.last_kernel()
    assert_close(got, exact_gradients([q, k, v, dout], **cu, **options))
    for i in range(len(LENGTHS_Q)):
        t, s = places(cu, i)
        own = tuple(x[place] for x, place in zip(got, (t, s, s), strict=True))
        if not LENGTHS_Q[i] or not LENGTHS_K[i]:
            assert not any(x.any() for x in own)
            continue
        alone = (
            [x[None, t] for x in (dout, q)] + [x[None, s] for x in (k, v)] + [out[None, t], lse[None, :, t]]
        )
        for a, b in zip(own, attention_backward(*(x.contiguous() for x in alone), **options), strict=True):
            assert same_bits(a, b[0])


@pytest.mark.parametrize("size", [64, 128])
def test_documents_do_not_touch_each_other_sm90(sm90: ModuleType, poisoned: None, size: int) -> None:
    tensors, cu = documents(LENGTHS_Q, LENGTHS_K, 2, 1, size)
    clean = gradients(tensors, causal=True, **cu)
    for bad in (1, 5):  # their neighbours' boxes end within tiles
        spoilt = [x.clone() for x in tensors]
        t, s = places(cu, bad)
        for x, place, value in zip(
            spoilt, (t, s, s, t), (torch.nan, torch.inf, torch.nan, torch.inf), strict=True
        ):
            x[place] = value
        got = gradients(spoilt, causal=True, **cu)
        for a, b, place in zip(got, clean, (t, s, s), strict=True):
            assert a[place].isnan().any()
            a[place] = b[place]
            assert same_bits(a, b)


@pytest.mark.parametrize("name", ["causal", "all"])
def test_many_small_documents_match_float64_sm90(sm90: ModuleType, poisoned: None, name: str) -> None:
    # More than the lanes of a warp, which look for them together.
    lengths_q, lengths_k = [i * 5 % 7 for i in range(40)], [i * 3 % 11 for i in range(40)]
    options = options_of(name, 2)
    tensors, cu = documents(lengths_q, lengths_k, 2, 1, 64)
    assert_close(gradients(tensors, **cu, **options), exact_gradients(tensors, **cu, **options))
    assert "backward_sm90" in sm90.last_kernel()


def test_documents_have_the_same_bits_in_every_run_sm90(sm90: ModuleType, poisoned: None) -> None:
    tensors, cu = documents([130, 3, 140], [260, 5, 290], 2, 1, 128)
    first, *others = (gradients(tensors, causal=True, **cu) for _ in range(3))
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


def test_lengths_that_decrease_keep_nobody_waiting_sm90(sm90: ModuleType) -> None:
    # A tile of keys of the last document has no block, and the next would wait for it.
    tensors, _ = documents([300], [600], 1, 1, 64)
    cu_q, cu_k = torch.tensor([0, 100, 200, 300]).int(), torch.tensor([0, 500, 40, 600]).int()
    gradients(tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert "backward_sm90" in sm90.last_kernel()


def test_documents_in_a_fused_projection_with_sinks_sm90(sm90: ModuleType, poisoned: None) -> None:
    lengths, sinks = [40, 0, 70], torch.randn(4)
    (q, k, v, dout), cu = documents(lengths, lengths, 4, 2, 64)
    views = torch.cat([q, k, v], 1).split([4, 2, 2], 1)
    out, lse = attention(*views, causal=True, sinks=sinks, return_lse=True, **cu)
    got = attention_backward(dout, *views, out, lse, causal=True, sinks=sinks, **cu)
    assert "backward_sm90" in sm90.last_kernel()
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    exact = torch.autograd.grad(
        attention_reference(*leaves[:3], causal=True, sinks=leaves[3], **cu), leaves, dout.double()
    )
    assert_close(got[:3], exact[:3])
    assert (got[3].double() - exact[3]).abs().max().item() <= 2.0**-7 * exact[3].abs().max().item()


@pytest.mark.parametrize("size", [64, 128])
def test_every_query_of_a_prefix_sees_it_sm90(sm90: ModuleType, poisoned: None, size: int) -> None:
    tensors = tensors_of((2, 80, 200, 2, 1), size)
    options = {"causal": True, "prefix_lengths": torch.tensor([170, 0]).int()}
    got = gradients(tensors, **options)
    assert "backward_sm90" in sm90.last_kernel()
    assert_close(got, exact_gradients(tensors, **options))
    for a, b in zip(got, gradients(tensors, causal=True), strict=True):
        assert same_bits(a[1], b[1]) and not same_bits(a[0], b[0])
    tensors, cu = documents([70, 9, 66], [150, 9, 66], 1, 1, size)
    options = {"causal": True, "prefix_lengths": torch.tensor([100, 9, 5]).int(), "soft_cap": 4.0, **cu}
    assert_close(gradients(tensors, **options), exact_gradients(tensors, **options))


# --- arithmetic of the launcher -----------------------------------------------------------------------------------

WINDOWS = [(-1, -1), (-1, 0), (0, 0), (100, 0), (130, 7), (-1, 300), (5, -1), (400, 1)]


@pytest.mark.parametrize("query_tile", [64, 128])
def test_tiles_are_visited_where_a_query_sees_a_key_sm90(simt: ModuleType, query_tile: int) -> None:
    shapes = [(1, 1), (300, 300), (129, 600), (600, 129), (64, 128), (0, 5)]
    masks = [(*window, 0) for window in WINDOWS] + [(-1, 0, 77), (-1, 0, 256)]
    for (queries, keys), (left, right, prefix) in itertools.product(shapes, masks):
        if prefix <= keys:
            of_keys, first = simt.backward_sm90_ranges(queries, keys, left, right, prefix, query_tile)
            place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
            seen = (key >= place - left) | (left < 0)
            seen &= (key <= place + right) | (right < 0) | (key < prefix)
            for k, (begin, end) in enumerate(of_keys):
                rows = seen[:, 128 * k : 128 * k + 128].any(1).nonzero().flatten()
                if len(rows):
                    assert begin <= rows[0] // query_tile and rows[-1] // query_tile < end
                assert end <= len(first)
            # Turns are taken by neighbours, from the first on: nobody waits for a tile that never comes.
            for q, start in enumerate(first):
                visitors = [k for k, (begin, end) in enumerate(of_keys) if begin <= q < end]
                assert visitors == list(range(start, start + len(visitors)))


def test_blocks_wait_for_earlier_blocks_only_sm90(simt: ModuleType) -> None:
    for tiles, members, abreast in [(1, 1, 1), (4, 7, 3), (1, 5, 2), (8, 4, 4)]:
        order = simt.backward_sm90_order(tiles, members, abreast)
        assert sorted(order) == [(m, t) for m in range(members) for t in range(tiles)]
        for member in range(members):
            assert [t for m, t in order if m == member] == list(range(tiles))
        assert [m for m, _ in order[:abreast]] == list(range(abreast))


def test_members_abreast_fit_the_cache_sm90(simt: ModuleType) -> None:
    abreast = simt.backward_sm90_members_abreast
    assert abreast(8192, 1, 128, 192) == 3 and abreast(1024, 1, 128, 192) == 24
    assert abreast(1024, 1, 128, 5) == 5 and abreast(1 << 20, 8, 128, 5) == 1 and abreast(1, 1, 64, 0) == 0


def test_a_block_has_room_for_its_tiles_sm90(simt: ModuleType) -> None:
    # 192 KB of tiles, lse and delta of two stages, barriers, what it works on.
    assert simt.backward_sm90_shared_bytes(128) == (192 << 10) + 4 * 64 * 4 + 10 * 8 + 128 <= 227 << 10
    assert simt.backward_sm90_shared_bytes(64) == (192 << 10) + 4 * 128 * 4 + 10 * 8 + 128 <= 227 << 10


def test_what_the_kernel_takes_sm90(sm90: ModuleType) -> None:
    takes = sm90.backward_sm90_takes
    assert takes(1, 1, 1, 1, 64, "") and takes(100, 300, 8, 2, 128, "")
    assert takes(100, 300, 8, 2, 128, "packed") and takes(100, 100, 2, 2, 64, "prefix")
    for size in (32, 72, 96, 256):
        assert not takes(100, 100, 1, 1, size, "")
    for change in ("pattern", "mask", "bias", "odd data", "odd stride", "expanded"):
        assert not takes(100, 100, 2, 2, 128, change), change
    assert not takes(1 << 25, 1 << 25, 1, 1, 64, "") and not takes(1, 1, 65536, 65536, 64, "")
