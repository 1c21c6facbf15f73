"""The forward kernel for sm_90, emulated (GPTCORE_SIMT_ARCH=90), against the float64 oracle; the order of its tiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gptcore import backend
from gptcore.ops.attention import attention, attention_reference
from gptcore.ops.attention_dropout import dropout_factors
from tests.cuda.emulation import simt_module
from tests.ops.attention_oracle import inputs, torch_attention
from tests.tolerance import assert_close_to_exact, same_bits

pytestmark = pytest.mark.skipif("simt" not in backend.available_isas(), reason="needs a build of tests/simt")


def forward(tensors: Any, *, taken: bool = True, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """out, whose room was NaN before, and lse; by the kernel for sm_90 if ``taken``, else by another."""
    out = torch.full(tensors[0].shape, float("nan")).to(tensors[0].dtype)
    _, lse = attention(*tensors, out=out, return_lse=True, **options)
    assert ("forward_sm90_kernel" in simt_module().last_kernel()) == taken
    return out, lse


def check_forward(tensors: Any, twin: Any = torch_attention, **options: Any) -> None:
    out, lse = forward(tensors, **options)
    doubles = [x.double() for x in tensors]
    exact, exact_lse = attention_reference(*doubles, return_lse=True, **options)
    length = tensors[1].shape[-3] * tensors[0].shape[-1]
    assert_close_to_exact(out, exact, twin(*tensors, **options), terms=length, what="out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    bound = 2.0**-23 * length**0.5 * max(1.0, exact_lse[seen].abs().max().item()) + 2.0**-20
    assert (lse[seen].double() - exact_lse[seen]).abs().max().item() <= bound


# queries, keys, heads, kv_heads, head size: tiles of 128 queries, blocks of 128 keys (96 and 64 for heads above 128)
SHAPES = [
    (17, 1, 1, 1, 8),
    (130, 257, 2, 1, 64),
    (129, 127, 2, 2, 40),
    (100, 260, 1, 1, 80),
    (260, 260, 2, 1, 128),
    (64, 400, 1, 1, 104),
    (140, 140, 1, 1, 256),
    (70, 130, 1, 1, 192),
]
MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"window_size": (37, 5)}, {"window_size": (-1, 70)}]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_at_every_shape_and_mask(sm90: None, shape: tuple[int, ...]) -> None:
    tensors = inputs(1, *shape, torch.bfloat16)
    for mask in MASKS:
        check_forward(tensors, **mask)


@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"soft_cap": 3.0, "causal": True},
        {"alibi_slopes": torch.tensor([0.5, 0.03])},
        {
            "alibi_slopes": torch.tensor([[0.5, 0.03], [0.25, 1.0]]),
            "soft_cap": 20.0,
            "window_size": (100, 30),
        },
        {"sinks": torch.tensor([0.5, 30.0]), "causal": True},
        {"softmax_scale": -0.2, "causal": True},
        {"softmax_scale": 0.0},
    ],
)
def test_options_on_scores(sm90: None, size: int, options: dict[str, Any]) -> None:
    check_forward(inputs(2, 100, 150, 2, 1, size, torch.bfloat16), **options)


@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
def test_f16(sm90: None, size: int) -> None:
    tensors = inputs(1, 70, 140, 2, 1, size, torch.float16)
    for options in ({"causal": True}, {"soft_cap": 3.0, "dropout_p": 0.5, "seed": 1}):
        out, _ = forward(tensors, **options)
        exact = attention_reference(*[x.double() for x in tensors], **options)
        scale = tensors[2].abs().max().item() / (1 - options.get("dropout_p", 0.0))
        assert (out.double() - exact).abs().max().item() <= 2.0**-10 * scale


def test_every_query_of_a_prefix_sees_it(sm90: None) -> None:
    tensors = inputs(2, 150, 290, 2, 1, 64, torch.bfloat16)
    prefixes = torch.tensor([200, 0]).int()
    key = torch.arange(290)
    seen = (key <= torch.arange(150)[:, None] + 140) | (key < prefixes[:, None, None, None])

    def twin(*tensors: Any, **_: Any) -> Any:
        return torch_attention(*tensors, attn_mask=seen)

    check_forward(tensors, twin, causal=True, prefix_lengths=prefixes)


@pytest.mark.parametrize("size", [64, 128, 192, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}])
def test_dropout_takes_the_bits_of_every_device(sm90: None, size: int, mask: dict[str, Any]) -> None:
    # Equal scores: every weight is one over the count of keys seen. With unit vectors as values the output shows them.
    queries, keys = 90, 136
    options = {"dropout_p": 0.25, "seed": 2**40 + 9, "offset": 77, **mask}
    q = torch.zeros(2, queries, 2, size).bfloat16()
    k, v = torch.zeros(2, keys, 1, size).bfloat16(), torch.zeros(2, keys, 1, size).bfloat16()
    factors = dropout_factors((2, 2, queries, keys), 0.25, options["seed"], 77)
    place = torch.arange(queries)[:, None] + keys - queries
    seen = torch.arange(keys) <= place if mask else torch.ones(queries, keys, dtype=torch.bool)
    for first in range(0, keys, size):
        v.zero_()
        for key in range(first, min(first + size, keys)):
            v[:, key, 0, key - first] = 1
        out, _ = forward((q, k, v), **options)
        weights = (factors * seen / seen.sum(1, keepdim=True)).transpose(1, 2)[..., first : first + size]
        torch.testing.assert_close(out[..., : weights.shape[-1]].float(), weights.float(), rtol=2**-8, atol=0)


def test_dropout_with_everything_else(sm90: None) -> None:
    options = {"soft_cap": 5.0, "alibi_slopes": torch.tensor([0.1, 0.2]), "sinks": torch.tensor([1.0, -1.0])}
    tensors = inputs(1, 200, 300, 2, 1, 128, torch.bfloat16)
    nothing_dropped, lse = forward(tensors, causal=True, **options)
    dropped, same = forward(tensors, causal=True, dropout_p=0.5, seed=3, **options)
    assert same_bits(lse, same) and not same_bits(dropped, nothing_dropped)
    exact = attention_reference(*[x.double() for x in tensors], causal=True, dropout_p=0.5, seed=3, **options)
    assert_close_to_exact(
        dropped, exact, nothing_dropped.double() * 0 + exact.bfloat16(), terms=300 * 128 * 2**8
    )


# --- packed documents ---------------------------------------------------------------------------------------------

LENGTHS_Q, LENGTHS_K = [5, 130, 0, 64, 1, 200, 40], [8, 300, 20, 0, 1, 200, 7]


def packed(size: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(x)]).int() for x in (LENGTHS_Q, LENGTHS_K))
    tensors = [torch.randn(n, h, size).bfloat16() for n, h in ((440, 2), (536, 1), (536, 1))]
    return tensors, {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


@pytest.mark.parametrize("size", [64, 128, 192])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (90, 10), "dropout_p": 0.2, "seed": 4}]
)
def test_documents_are_what_they_are_alone(sm90: None, size: int, options: dict[str, Any]) -> None:
    (q, k, v), cu = packed(size)
    out, lse = forward((q, k, v), **cu, **options)
    exact, exact_lse = attention_reference(*[x.double() for x in (q, k, v)], return_lse=True, **cu, **options)
    assert_close_to_exact(out, exact, exact.bfloat16(), terms=300 * size * 2**8)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    if options.get("dropout_p"):
        return  # a document's number is in its bits
    for i in range(len(LENGTHS_Q)):
        t, s = (slice(*cu[name][i : i + 2].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        if LENGTHS_Q[i] > 16 and LENGTHS_K[i]:  # fewer go to the kernel for decoding
            assert same_bits(out[None, t], forward((q[None, t], k[None, s], v[None, s]), **options)[0])


def test_documents_do_not_touch_each_other(sm90: None) -> None:
    (q, k, v), cu = packed(64)
    clean, _ = forward((q, k, v), causal=True, **cu)
    for x in (k, v):
        x[8:308] = float("nan")  # all of the second document's
    got, _ = forward((q, k, v), causal=True, **cu)
    assert same_bits(got[:5], clean[:5]) and same_bits(got[135:], clean[135:]) and got[5:135].isnan().all()


# --- what else is promised ----------------------------------------------------------------------------------------


def test_not_a_number_stays_in_the_rows_that_see_it(sm90: None) -> None:
    q, k, v = inputs(1, 200, 200, 1, 1, 64, torch.bfloat16)
    clean, _ = forward((q, k, v), causal=True)
    k[0, 150, 0, 3] = float("nan")
    got, _ = forward((q, k, v), causal=True)
    assert same_bits(got[:, :150], clean[:, :150]) and got[:, 150:].isnan().all()
    q[0, 20] = float("nan")
    assert forward((q, k, v), causal=True)[0][:, 20].isnan().all()


def test_views_are_read_and_written_in_place(sm90: None) -> None:
    qkv = torch.randn(2, 150, 4, 72).bfloat16()
    q, k, v = qkv.split([2, 1, 1], 2)
    assert not q.is_contiguous()
    room = torch.full((2, 150, 3, 88), 7.0).bfloat16()
    out = room[..., :2, 8:80]
    attention(q, k, v, causal=True, out=out)
    assert "forward_sm90_kernel" in simt_module().last_kernel()
    assert same_bits(out, forward([x.contiguous() for x in (q, k, v)], causal=True)[0])
    room[..., :2, 8:80] = 7
    assert (room == 7).all()


def test_blocks_of_a_grid_share_the_tiles(sm90: None) -> None:
    # 3 multiprocessors, 12 tiles: with equal lengths each takes every third, else what is left.
    tensors = inputs(2, 300, 300, 2, 1, 64, torch.bfloat16)
    check_forward(tensors)
    check_forward(tensors, causal=True)


def test_the_same_bits_in_every_run(sm90: None) -> None:
    tensors = inputs(
        1, 300, 300, 2, 1, 64, torch.bfloat16
    )  # threads and blocks take turns in another order each time
    first, lse = forward(tensors, causal=True)
    for _ in range(2):
        again, same = forward(tensors, causal=True)
        assert same_bits(first, again) and same_bits(lse, same)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.ones(1, 1, 40, 50, dtype=torch.bool)},
        {"attn_bias": torch.zeros(40, 50)},
        {"causal": True, "sparse_stride": 8},
    ],
)
def test_rarer_options_are_left_to_the_other_kernel(sm90: None, options: dict[str, Any]) -> None:
    forward(inputs(1, 40, 50, 1, 1, 64, torch.bfloat16), taken=False, **options)


def test_rows_the_copy_engine_cannot_read_are_left_to_the_other_kernel(sm90: None) -> None:
    forward(inputs(1, 40, 50, 1, 1, 33, torch.bfloat16), taken=False)


# --- the order of tiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "section"),
    [
        ((2, 300, 300, 6, 2, 64), 4),  # all key heads fit the cache
        ((2, 1000, 40000, 4, 4, 128), 1),  # 20 MB a head
        ((1, 640, 8192, 32, 8, 128), 8),  # 4 MB a head
        ((1, 640, 8192, 40, 10, 128), 8),  # and two heads more
    ],
)
def test_tiles_are_each_taken_once_by_sections_that_fit_the_cache(
    problem: tuple[int, ...], section: int
) -> None:
    batch, queries, _, heads, kv_heads, _ = problem
    order = simt_module().forward_sm90_order(*problem)
    firsts = range(0, queries, 128)
    assert sorted(map(tuple, order)) == sorted(itertools.product(range(batch), range(heads), firsts))
    unit_tiles = heads // kv_heads * len(firsts)
    for start in range(0, len(order), section * unit_tiles):
        tiles = order[start : start + section * unit_tiles]
        assert (
            len({(index, head * kv_heads // heads) for index, head, _ in tiles}) == len(tiles) // unit_tiles
        )
        assert [first for *_, first in tiles] == sorted((first for *_, first in tiles), reverse=True)
