"""Embedding, rotary, gated activations and philox on CUDA: what their cuts over threads and blocks could get wrong."""

from __future__ import annotations

import pytest
import torch

from gptcore import backend
from gptcore.ops import gated_activation as gated
from gptcore.ops.embedding import embedding, embedding_backward
from gptcore.ops.philox import philox
from gptcore.ops.rotary import rotary, rotary_reference, rotary_tables
from tests.tolerance import assert_close_to_exact, check_against_float64, same_bits

DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("on_simt")


def _exact(ids: torch.Tensor, grad: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return torch.zeros(vocabulary, grad.shape[1], dtype=torch.float64).index_add_(
        0, ids.long(), grad.double()
    )


@pytest.mark.parametrize("tokens", [1, 128, 129, 4096, 4097, 9000])
@pytest.mark.parametrize("long", [False, True])
def test_embedding_gradient_of_any_number_of_tiles(tokens: int, long: bool) -> None:
    ids = (torch.rand(tokens) ** 4 * 700).to(
        torch.int64 if long else torch.int32
    )  # two digits, some ids often
    grad = torch.randn(tokens, 12)
    got = embedding_backward(ids, grad, 700)
    assert_close_to_exact(got, _exact(ids, grad, 700), terms=int(ids.bincount().max()), summand=4.0)
    assert same_bits(got, embedding_backward(ids, grad, 700))


def test_embedding_gradient_of_ids_with_three_digits() -> None:
    vocabulary = 300_000
    ids = torch.cat([torch.randint(vocabulary, (500,)), torch.tensor([0, vocabulary - 1, 262_144, 511, 512])])
    grad = torch.randn(ids.numel(), 1)
    assert_close_to_exact(embedding_backward(ids, grad, vocabulary), _exact(ids, grad, vocabulary), terms=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 8, 264])
def test_frequent_ids_are_summed_by_chunks_of_their_own(dtype: torch.dtype, width: int) -> None:
    counts = (127, 128, 129, 1, 255, 256, 257, 0, 640, 3)
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    ids = ids[torch.randperm(ids.numel())]
    grad = torch.randn(ids.numel(), width).to(dtype)
    got = embedding_backward(ids, grad, len(counts))
    assert_close_to_exact(got, _exact(ids, grad, len(counts)), terms=640, summand=4.0)
    for v in range(len(counts)):  # alone, an id's occurrences lie elsewhere in the sorted order
        alone = embedding_backward(ids[ids == v], grad[ids == v], len(counts))
        assert same_bits(got[v], alone[v])
    moved = torch.empty(grad.numel() + 1, dtype=dtype)[1:].view_as(grad).copy_(grad)
    assert same_bits(got, embedding_backward(ids, moved, len(counts)))


@pytest.mark.parametrize("kind", DTYPES)
def test_ids_outside_the_table_give_nan_and_no_gradient(kind: torch.dtype) -> None:
    weight = torch.randn(9, 16).to(kind)
    ids = torch.tensor([3, -1, 9, 8, 2**40, 3])
    out = embedding(ids, weight)
    assert out[[1, 2, 4]].isnan().all() and same_bits(out[[0, 3, 5]], weight[[3, 8, 3]])
    grad = torch.randn(6, 16).to(kind)
    got = torch.randn(9, 16).to(kind)
    expected = got.double().index_add(0, ids[[0, 3, 5]], grad[[0, 3, 5]].double())
    backend.extension().embedding_backward(ids, grad, got, True)
    assert_close_to_exact(got, expected, terms=3, summand=4.0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, size, turned", [(5, 128, 128), (9, 64, 32), (1, 80, 64), (70, 32, 32)])
def test_rotary_by_whole_packs(dtype, interleaved: bool, heads: int, size: int, turned: int) -> None:
    x = torch.randn(2, 5, heads, size).to(dtype)
    cos, sin = rotary_tables(20, turned)
    where = torch.randint(20, (2, 5), dtype=torch.int32)

    def reference(x):
        wide = x if x.dtype == torch.float64 else x.float()
        return rotary_reference(wide, cos, sin, interleaved=interleaved, position=where).to(x.dtype)

    check_against_float64(
        lambda x: rotary(x, cos, sin, interleaved=interleaved, position=where),
        reference,
        [x],
        [torch.randn(x.shape)],
    )
    moved = torch.empty(x.numel() + 1, dtype=dtype)[1:].view_as(x).copy_(x)
    y = rotary(x, cos, sin, interleaved=interleaved, position=where)
    assert same_bits(y, rotary(moved, cos, sin, interleaved=interleaved, position=where))
    assert same_bits(y, rotary(x, cos, sin, interleaved=interleaved, position=where, out=x))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_position_outside_the_table_gives_nan_where_it_turns(interleaved: bool) -> None:
    cos, sin = rotary_tables(6, 8)
    x = torch.randn(5, 3, 12)
    where = torch.tensor([0, -1, 5, 6, 2**31 - 1], dtype=torch.int32)
    y = rotary(x, cos, sin, interleaved=interleaved, position=where)
    assert y[[1, 3, 4], :, :8].isnan().all() and not y[[0, 2]].isnan().any()
    assert same_bits(y[..., 8:], x[..., 8:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(900, 8), (250, 2064), (3, 40)])
def test_gradients_of_biases_over_any_number_of_blocks(dtype: torch.dtype, rows: int, width: int) -> None:
    gate, up = torch.randn(2, rows, width).to(dtype)
    biases = [torch.randn(width), torch.randn(width)]
    grad = torch.randn(rows, width).to(dtype).float()

    def rounded(function):
        return lambda gate, up, *b: function(gate, up, *b).to(gate.dtype)

    check_against_float64(
        rounded(gated.swiglu),
        rounded(gated.swiglu_reference),
        [gate, up, *biases],
        [grad],
        terms=rows,
        summand=8.0,
    )
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (gate, up, *biases)]
        results.append(torch.autograd.grad(gated.swiglu(*leaves), leaves, grad.to(dtype)))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_philox_of_misaligned_counters_and_in_place() -> None:
    counters = torch.randint(-(2**31), 2**31, (300, 4)).to(torch.int32)
    moved = torch.empty(1201, dtype=torch.int32)[1:].view(300, 4).copy_(counters)
    expected = philox(counters, 5)
    backend.set_isa(backend.available_isas()[0])
    assert torch.equal(expected, philox(counters, 5))
    backend.set_isa("simt")
    assert torch.equal(expected, philox(moved, 5))
    assert philox(moved, 5, out=moved) is moved and torch.equal(expected, moved)
