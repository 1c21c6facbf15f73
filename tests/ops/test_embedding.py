from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend, ops
from gptcore.ops.embedding import embedding, embedding_backward, embedding_reference
from tests.strides import EDGES, within_larger
from tests.tolerance import assert_close_to_exact, assert_same_for_threads, same_bits, value_and_gradients

DTYPES = [torch.float32, torch.bfloat16]


def _check(ids: torch.Tensor, weight: torch.Tensor, edges: tuple[int, int] = (0, 0)) -> None:
    grad = torch.randn(*ids.shape, weight.shape[1] + sum(edges)).to(weight.dtype)
    kernel = within_larger(lambda w: embedding(ids, w), edges)
    reference = within_larger(lambda w: embedding_reference(ids, w), edges)
    (out,), (got,) = value_and_gradients(kernel, [weight], [grad])
    assert same_bits(out, reference(weight))  # a copy: exact
    _, (exact,) = value_and_gradients(reference, [weight.double()], [grad.double()])
    # f32 sums of as many terms as the most frequent id has, then one rounding.
    most = ids.flatten().bincount().max().item() if ids.numel() else 1
    assert_close_to_exact(got, exact, terms=most, what="dweight")


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    ids = torch.tensor([3, 0, 3, 6, 3, 1])
    for width in [*range(34), 63, 64, 65, 127, 128, 129, 300]:
        _check(ids, torch.randn(7, width).to(dtype))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 12), max_size=3),
    vocabulary=st.integers(1, 200),
    width=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    long=st.booleans(),
    edges=EDGES,
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_type(
    shape, vocabulary: int, width: int, dtype, long: bool, edges, seed: int
) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(vocabulary, shape, dtype=torch.int64 if long else torch.int32)
    _check(ids, torch.randn(vocabulary, width).to(dtype), edges)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 600),
    vocabulary=st.integers(1, 40),
    width=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(DTYPES),
    accumulate=st.booleans(),
    edges=EDGES,
    seed=st.integers(0, 2**16),
)
def test_any_gradient_type_and_accumulation(
    tokens: int, vocabulary: int, width: int, dtype, kind, accumulate: bool, edges, seed: int
) -> None:
    torch.manual_seed(seed)
    ids = (torch.rand(tokens) ** 2 * vocabulary).long()  # some far more often than others
    larger = torch.randn(tokens, width + sum(edges)).to(dtype)
    grad = larger[:, edges[0] : edges[0] + width]
    got = torch.randn(vocabulary, width).to(kind)
    exact = got.double() if accumulate else torch.zeros(vocabulary, width, dtype=torch.float64)
    exact = exact.index_add(0, ids, grad.double())
    backend.extension().embedding_backward(ids, grad, got, accumulate)
    most = int(ids.bincount().max()) + 1 if tokens else 1
    assert_close_to_exact(got, exact, terms=most, summand=5.0, what="dweight")  # 5 deviations


@pytest.mark.parametrize("dtype", DTYPES)
def test_frequent_ids_take_the_split_path(dtype: torch.dtype) -> None:
    # Above 256 occurrences a row is summed by columns; some ids just below, one far above, one not at all.
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate((2000, 257, 256, 255, 0, 1))])
    _check(ids[torch.randperm(ids.numel())], torch.randn(6, 200).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_run(threads: None, dtype: torch.dtype) -> None:
    ids = (torch.rand(3000) ** 3 * 500).long()  # uneven, as text is
    grad = torch.randn(3000, 100).to(dtype)
    assert_same_for_threads(lambda: [embedding_backward(ids, grad, 500)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_table_is_zeroed_past_the_caches(isa: str, dtype: torch.dtype) -> None:
    # Above 64 MiB, with rows of 4,099 elements so that runs of empty rows start and end off any line.
    vocabulary, width = 8400 if dtype == torch.bfloat16 else 4200, 4099
    ids = torch.tensor([0, 1, 5, 63, 64, 100, 5, vocabulary - 2])
    grad = torch.randn(8, width).to(dtype)
    dweight = torch.full((vocabulary, width), float("nan"), dtype=dtype)
    backend.extension().embedding_backward(ids, grad, dweight, False)
    small = embedding_backward(ids[:7], grad[:7], 101)
    assert same_bits(dweight[:101], small)
    assert same_bits(dweight[-2], grad[-1])
    assert not dweight[101:-2].any() and not dweight[-1].any()


def test_row_gradient_depends_on_its_own_tokens_only() -> None:
    ids, grad = torch.randint(50, (400,)), torch.randn(400, 40)
    whole = embedding_backward(ids, grad, 50)
    mine = ids == 7
    assert same_bits(whole[7:8], embedding_backward(ids[mine], grad[mine], 50)[7:8])


def test_main_grad_takes_the_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(30, 20).bfloat16())
    ids, grad = torch.randint(30, (5, 9)), torch.randn(5, 9, 20).bfloat16()
    start = torch.randn(30, 20)
    weight.main_grad = start.clone()
    embedding(ids, weight).backward(grad)
    assert weight.grad is None
    added = torch.zeros(30, 20).double().index_add_(0, ids.flatten(), grad.flatten(0, 1).double())
    assert_close_to_exact(weight.main_grad, start.double() + added, terms=10)
    untouched = added.abs().sum(1) == 0
    assert same_bits(weight.main_grad[untouched], start[untouched])
    before = weight.main_grad.clone()
    embedding(ids, weight).backward(grad)  # again: it accumulates
    assert_close_to_exact(weight.main_grad, before.double() + added, terms=10)


def test_strided_and_expanded_gradients_and_ids() -> None:
    weight = torch.randn(10, 24)
    ids = torch.randint(10, (6, 8)).t()
    assert same_bits(embedding(ids, weight), embedding(ids.contiguous(), weight))
    wide = torch.randn(8, 6, 50)
    assert same_bits(
        embedding_backward(ids, wide[..., 1:25], 10), embedding_backward(ids, wide[..., 1:25].clone(), 10)
    )
    leaf = weight.clone().requires_grad_()
    embedding(ids, leaf).sum().backward()  # the gradient arrives expanded, all strides 0
    assert torch.equal(leaf.grad, ids.flatten().bincount(minlength=10)[:, None].expand(10, 24).float())
    table = torch.randn(10, 48)[:, :24]
    assert same_bits(embedding(ids, table), embedding(ids, table.clone()))


def test_infinities_and_nan_stay_in_their_row() -> None:
    ids, grad = torch.tensor([0, 1, 2, 1]), torch.ones(4, 5)
    grad[0, 0], grad[1, 1], grad[3, 2] = float("nan"), float("inf"), -float("inf")
    got = embedding_backward(ids, grad, 4)
    assert got[0, 0].isnan() and got[1, 1] == float("inf") and got[1, 2] == -float("inf")
    assert got[2].tolist() == [1] * 5 and got[3].tolist() == [0] * 5


def test_numpy_arrays() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weight, ids = torch.randn(9, 11), torch.randint(9, (4, 3))
    out = embedding(ids.numpy(), weight.numpy())
    assert isinstance(out, np.ndarray) and same_bits(torch.from_numpy(out), weight[ids])
    dweight = embedding_backward(ids.numpy(), out, 9)
    assert same_bits(torch.from_numpy(dweight), embedding_backward(ids, weight[ids], 9))
    half = weight.numpy().astype(ml_dtypes.bfloat16)
    assert np.array_equal(embedding(ids.numpy(), half), half[ids.numpy()])


def test_opcheck_and_gradcheck() -> None:
    ids, weight = torch.randint(5, (2, 3)), torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.gptcore.embedding.default, (ids, weight))
    torch.autograd.gradcheck(
        lambda w: embedding_reference(ids, w), (weight.detach().double().requires_grad_(),)
    )


def test_compiles_into_one_graph() -> None:
    ids, weight = torch.randint(9, (3, 7)), torch.randn(9, 33)

    def block(w):
        return ops.embedding(ids, w) * 2

    eager, compiled = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    block(eager).square().sum().backward()
    torch.compile(block, fullgraph=True)(compiled).square().sum().backward()
    assert same_bits(eager.grad, compiled.grad)


IDS = torch.tensor([0, 1])
BAD = [
    (
        lambda: embedding(torch.tensor([0, 4]), torch.randn(4, 3)),
        ValueError,
        "'ids': got index 4.*from 0 to 3",
    ),
    (lambda: embedding(torch.tensor([0, -1]), torch.randn(4, 3)), ValueError, "'ids': got index -1"),
    (
        lambda: embedding(torch.tensor([0.0]), torch.randn(4, 3)),
        TypeError,
        "'ids': got float32, expected int64",
    ),
    (lambda: embedding(IDS, torch.randn(4, 3).double()), TypeError, "'weight': got float64"),
    (lambda: embedding(IDS, torch.randn(4)), ValueError, "'weight'.*2 dimensions"),
    (lambda: embedding(IDS, torch.randn(4, 3), out=torch.empty(2, 4)), ValueError, "'out'.*2 rows of 3"),
    (lambda: embedding_backward(IDS, torch.randn(3, 4), 5), ValueError, "'grad_out'.*2 rows of 4"),
    (
        lambda: embedding_backward(IDS, torch.randn(2, 4), 1),
        ValueError,
        "'ids': got index 1, expected.*0 to 0",
    ),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_out_form_writes_there_and_refuses_gradients() -> None:
    weight, out = torch.randn(4, 3), torch.full((2, 3), 7.0)
    assert embedding(IDS, weight, out=out) is out and same_bits(out, weight[:2])
    with pytest.raises(RuntimeError, match="out="):
        embedding(IDS, weight.requires_grad_(), out=out)
    out.fill_(7)
    with pytest.raises(ValueError, match="index 4"):
        embedding(torch.tensor([0, 4]), weight.detach(), out=out)
    assert (out == 7).all()


def test_ids_of_many_dimensions() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    ids = torch.randint(5, (2,) + (1,) * 12 + (2,))
    got = embedding(ids, weight)
    got.sum().backward()
    assert got.shape == (*ids.shape, 3) and torch.equal(got, weight[ids])
    assert weight.grad is not None and weight.grad.sum() == ids.numel() * 3
