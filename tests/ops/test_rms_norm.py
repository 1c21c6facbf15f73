from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend, ops
from gptcore.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_reference, rms_norm_stats
from tests.strides import EDGES, within_larger
from tests.tolerance import assert_same_for_threads, check_against_float64, same_bits

DTYPES = [torch.float32, torch.bfloat16]
# Every width from one lane to beyond two AVX-512 vectors, then four running sums with and without a tail.
WIDTHS = [*range(1, 34), 63, 64, 65, 127, 128, 129, 768]


def _inputs(rows: int, width: int, dtype: torch.dtype):
    return torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        inputs = _inputs(5, width, dtype)  # a group of four rows and one alone
        check_against_float64(rms_norm, rms_norm_reference, inputs, [torch.randn(5, width)], terms=width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_at_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, grad = torch.randn(5, width).to(dtype), torch.randn(5, width)
        check_against_float64(rms_norm, rms_norm_reference, [x], [grad], terms=width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_returns_sum_and_both_gradients(isa: str, dtype: torch.dtype) -> None:
    x, weight = _inputs(37, 130, dtype)
    residual = torch.randn(37, 130).to(dtype)

    def kernel(x, r, w):
        return rms_norm(x, w, residual=r)

    def reference(x, r, w):
        return rms_norm_reference(x, w, residual=r)

    grads = [torch.randn(37, 130), torch.randn(37, 130)]
    check_against_float64(kernel, reference, [x, residual, weight], grads, terms=130)
    _, h = kernel(x, residual, weight)
    assert same_bits(h, x + residual)


@settings(max_examples=80, deadline=None)
@given(
    lead=st.lists(st.integers(0, 9), max_size=3),
    width=st.integers(1, 90),
    weighted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    f32_weight=st.booleans(),
    residual=st.booleans(),
    edges=EDGES,
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_option(
    lead, width: int, weighted: bool, dtype, f32_weight: bool, residual: bool, edges, seed: int
) -> None:
    torch.manual_seed(seed)
    shape, rows = (*lead, width), math.prod(lead)
    # Sums of two such numbers are exact in bf16: rounding h is the residual test's business.
    x, added = (torch.randint(-40, 41, (2, *shape)) / 16).to(dtype)
    vectors = [torch.randn(width).to(torch.float32 if f32_weight else dtype)][: int(weighted)]
    offset = float(seed % 2) if vectors else 0.0
    grads = [torch.randn(*lead, width + sum(edges)) for _ in range(1 + residual)]

    def of(norm):
        def function(x, added, *vectors):
            y = norm(x, *vectors, residual=added if residual else None, weight_offset=offset)
            # The gradient of an unused residual must exist.
            return tuple(t.to(x.dtype) for t in y) if residual else (y + 0 * added).to(x.dtype)

        return within_larger(function, edges)

    # Rows of few elements give gradients that cancel to almost nothing: what is added up is grad * weight * rstd.
    factor = (vectors[0] + offset).abs().max().item() if vectors else 1.0
    h = (x + added if residual else x).double()
    largest = max(g.abs().max().item() if g.numel() else 0.0 for g in grads)
    rstd = (h.square().mean(-1) + 1e-6).min().item() ** -0.5 if rows else 0.0
    check_against_float64(
        of(rms_norm),
        of(rms_norm_reference),
        [x, added, *vectors],
        grads,
        terms=max(rows, width),
        summand=largest * max(factor, 1.0) * rstd,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_centred_weight_at_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, weight = _inputs(5, width, dtype)
        check_against_float64(
            lambda *a: rms_norm(*a, weight_offset=1.0),
            lambda *a: rms_norm_reference(*a, weight_offset=1.0),
            [x, weight],
            [torch.randn(5, width)],
            terms=width,
        )
        # A small bf16 weight would be lost in 1 + weight of its own type.
        small = torch.full((width,), 2.0**-10).to(dtype)
        assert same_bits(rms_norm(x, small, weight_offset=1.0), rms_norm(x, small.float() + 1))


def test_special_values_stay_in_their_row() -> None:
    x, weight = _inputs(4, 40, torch.float32)
    clean = rms_norm(x, weight)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got = rms_norm(x, weight)
    assert got[1].isnan().all() and got[2, 5].isnan() and (got[2, 6:] == 0).all()  # 1 / sqrt(inf) = 0
    assert same_bits(got[[0, 3]], clean[[0, 3]])
    assert (rms_norm(torch.zeros(2, 9)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_run(threads: None, dtype: torch.dtype) -> None:
    x, weight = _inputs(1000, 768, dtype)
    grad = torch.randn(1000, 768).to(dtype)

    def step() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = rms_norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    assert_same_for_threads(step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    x, weight = _inputs(303, 100, dtype)
    grad = torch.randn(303, 100).to(dtype)
    whole = rms_norm(x, weight)
    dx, _ = rms_norm_backward(grad, x, weight, rms_norm_stats(x))
    for row in (0, 17, 302):
        one = slice(row, row + 1)
        assert same_bits(whole[one], rms_norm(x[one], weight))
        alone, _ = rms_norm_backward(grad[one], x[one], weight, rms_norm_stats(x[one]))
        assert same_bits(dx[one], alone)


def test_misaligned_strided_and_batched_inputs() -> None:
    base = torch.randn(20 * 200 + 1)
    x = base[1:].view(4, 5, 200)[..., :77]
    weight = torch.randn(78)[1:]
    check_against_float64(rms_norm, rms_norm_reference, [x, weight], [torch.randn(4, 5, 77)], terms=77)
    assert same_bits(rms_norm(x, weight), rms_norm(x.contiguous(), weight.clone()))
    for permuted in (torch.randn(30, 20).t(), torch.randn(3, 4, 5, 6).transpose(1, 2)):
        assert same_bits(rms_norm(permuted), rms_norm(permuted.contiguous()))


def test_numpy_arrays_and_explicit_backward() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, weight = _inputs(6, 50, torch.float32)
    grad = torch.randn(6, 50)
    y = rms_norm(x.numpy(), weight.numpy())
    assert isinstance(y, np.ndarray) and same_bits(torch.from_numpy(y), rms_norm(x, weight))
    gradients = rms_norm_backward(grad.numpy(), x.numpy(), weight.numpy(), rms_norm_stats(x.numpy()))
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    for a, b in zip(gradients, torch.autograd.grad(rms_norm(*leaves), leaves, grad), strict=True):
        assert same_bits(torch.from_numpy(a), b)
    centred = rms_norm(x.numpy(), weight.numpy(), weight_offset=1.0)
    assert same_bits(torch.from_numpy(centred), rms_norm(x, weight + 1))
    rstd = rms_norm_stats(x.numpy())
    gradients = rms_norm_backward(grad.numpy(), x.numpy(), weight.numpy(), rstd, weight_offset=1.0)
    whole = rms_norm_backward(grad.numpy(), x.numpy(), (weight + 1).numpy(), rstd)
    for a, b in zip(gradients, whole, strict=True):
        assert same_bits(torch.from_numpy(a), torch.from_numpy(b))
    half = x.numpy().astype(ml_dtypes.bfloat16)
    expected = rms_norm(x.bfloat16()).view(torch.int16)
    assert same_bits(torch.from_numpy(rms_norm(half).view(np.int16)), expected)


def test_opcheck_and_gradcheck() -> None:
    x, weight = (t.requires_grad_() for t in _inputs(3, 8, torch.float32))
    residual = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.gptcore.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.gptcore.add_rms_norm.default, (x, residual, weight, 1e-6, 1.0))
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    torch.autograd.gradcheck(rms_norm_reference, doubles)
    torch.autograd.gradcheck(lambda *a: rms_norm_reference(*a, weight_offset=1.0), doubles)


def test_compiles_into_one_graph() -> None:
    inputs = [*_inputs(9, 33, torch.float32), torch.randn(9, 33)]

    def block(x, w, r):
        y, h = ops.rms_norm(x, w, residual=r)
        return y * 2 + ops.rms_norm(h, w, weight_offset=1.0)

    eager = [t.clone().requires_grad_() for t in inputs]
    compiled = [t.clone().requires_grad_() for t in inputs]
    block(*eager).sum().backward()
    torch.compile(block, fullgraph=True)(*compiled).sum().backward()
    for a, b in zip(eager, compiled, strict=True):
        assert same_bits(a.grad, b.grad)


def test_second_derivative_is_refused_with_a_sentence() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


BAD = [
    (lambda: rms_norm(torch.randn(3, 4).double()), TypeError, "'x': got float64, expected float32 or"),
    (
        lambda: rms_norm(torch.randn(3, 4), torch.randn(5)),
        ValueError,
        "'weight'.*\\(5,\\), expected.*\\(4,\\)",
    ),
    (lambda: rms_norm(torch.randn(3, 4), residual=torch.randn(3, 5)), ValueError, "'residual'"),
    (lambda: rms_norm(torch.randn(3, 4), residual=torch.randn(3, 4).bfloat16()), TypeError, "'residual'"),
    (lambda: rms_norm(torch.randn(3, 0)), ValueError, "at least 1 element"),
    (lambda: rms_norm(torch.randn(3, 4), eps=-1.0), ValueError, "'eps'.*0 or more"),
    (lambda: rms_norm(torch.randn(3, 4), weight_offset=1.0), ValueError, "'weight_offset'.*without 'weight'"),
    (
        lambda: rms_norm(torch.randn(3, 4), torch.ones(4), weight_offset=float("inf")),
        ValueError,
        "'weight_offset': got inf, expected a finite",
    ),
    (lambda: rms_norm(torch.empty(3, 4, device="meta")), TypeError, "cannot read .*meta"),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_out_form_writes_there_and_refuses_gradients() -> None:
    x, weight = _inputs(3, 9, torch.float32)
    out = torch.empty(3, 9)
    assert rms_norm(x, weight, out=out) is out and same_bits(out, rms_norm(x, weight))
    with pytest.raises(RuntimeError, match="out="):
        rms_norm(x, weight.requires_grad_(), out=out)
    read_only = np.full((2, 3), 7.0, np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="'out': got a read-only array"):
        rms_norm(np.ones((2, 3), np.float32), out=read_only)
    assert (read_only == 7).all()


def test_the_isas_agree_within_rounding() -> None:
    x, weight = _inputs(11, 333, torch.float32)
    before = backend.isa()
    results = []
    for name in backend.available_isas():
        backend.set_isa(name)
        results.append(rms_norm(x, weight))
    backend.set_isa(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)
