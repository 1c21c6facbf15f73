from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend, ops
from gptcore.ops.layer_norm import layer_norm, layer_norm_backward, layer_norm_reference, layer_norm_stats
from tests.strides import EDGES, within_larger
from tests.tolerance import assert_same_for_threads, check_against_float64, same_bits

DTYPES = [torch.float32, torch.bfloat16]
# Every width from one lane to beyond two AVX-512 vectors, then four running sums with and without a tail.
WIDTHS = [*range(1, 34), 63, 64, 65, 127, 128, 129, 768, 1000]


def _inputs(rows: int, width: int, dtype: torch.dtype, *, scale: float = 1.0, shift: float = 0.0):
    x = (torch.randn(rows, width) * scale + shift).to(dtype)
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    return x, weight, bias


def _summand(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> float:
    """The size of what dx adds up, grad * weight * rstd: in rows of few elements it cancels to almost nothing."""
    if not x.numel():
        return 0.0
    spread = (x.double() - x.double().mean(-1, keepdim=True)).square().mean(-1) + 1e-5
    return (grad.abs().max() * weight.abs().max() * spread.min() ** -0.5).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, weight, bias = _inputs(5, width, dtype)
        grad = torch.randn(5, width)
        summand = _summand(x, weight, grad)
        check_against_float64(
            layer_norm, layer_norm_reference, [x, weight, bias], [grad], terms=width, summand=summand
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_at_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, grad = torch.randn(5, width).to(dtype), torch.randn(5, width)
        check_against_float64(
            layer_norm,
            layer_norm_reference,
            [x],
            [grad],
            terms=width,
            summand=_summand(x, torch.ones(1), grad),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_returns_sum_and_both_gradients(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = _inputs(37, 130, dtype)
    residual = torch.randn(37, 130).to(dtype)

    def kernel(x, r, w, b):
        return layer_norm(x, w, b, residual=r)

    def reference(x, r, w, b):
        return layer_norm_reference(x, w, b, residual=r)

    grads = [torch.randn(37, 130), torch.randn(37, 130)]
    check_against_float64(kernel, reference, [x, residual, weight, bias], grads, terms=130)
    _, h = kernel(x, residual, weight, bias)
    assert same_bits(h, x + residual)


@settings(max_examples=80, deadline=None)
@given(
    lead=st.lists(st.integers(0, 9), max_size=3),
    width=st.integers(1, 90),
    affine=st.sampled_from(["none", "weight", "both"]),
    dtype=st.sampled_from(DTYPES),
    f32_weight=st.booleans(),
    residual=st.booleans(),
    edges=EDGES,
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_option(
    lead, width: int, affine: str, dtype, f32_weight: bool, residual: bool, edges, seed: int
) -> None:
    torch.manual_seed(seed)
    shape, rows = (*lead, width), math.prod(lead)
    # Sums of two such numbers are exact in bf16: rounding h is the residual test's business.
    x, added = (torch.randint(-40, 41, (2, *shape)) / 16).to(dtype)
    kind = torch.float32 if f32_weight else dtype
    vectors = [torch.randn(width).to(kind) for _ in range({"none": 0, "weight": 1, "both": 2}[affine])]
    offset = float(seed % 2) if vectors else 0.0
    grads = [torch.randn(*lead, width + sum(edges)) for _ in range(1 + residual)]

    def of(norm):
        def function(x, added, *vectors):
            y = norm(x, *vectors, residual=added if residual else None, weight_offset=offset)
            # The gradient of an unused residual must exist.
            return tuple(t.to(x.dtype) for t in y) if residual else (y + 0 * added).to(x.dtype)

        return within_larger(function, edges)

    factor = vectors[0] + offset if vectors else torch.ones(1)
    h = (x + added if residual else x).reshape(rows, width)
    largest = torch.tensor(max(g.abs().max().item() if g.numel() else 0.0 for g in grads))
    summand = _summand(h, factor, largest)
    check_against_float64(
        of(layer_norm),
        of(layer_norm_reference),
        [x, added, *vectors],
        grads,
        terms=max(rows, width),
        summand=summand,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_centred_weight_at_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, weight, bias = _inputs(5, width, dtype)
        grad = torch.randn(5, width)
        check_against_float64(
            lambda *a: layer_norm(*a, weight_offset=1.0),
            lambda *a: layer_norm_reference(*a, weight_offset=1.0),
            [x, weight, bias],
            [grad],
            terms=width,
            summand=_summand(x, weight + 1, grad),
        )
        # A small bf16 weight would be lost in 1 + weight of its own type.
        small = torch.full((width,), 2.0**-10).to(dtype)
        assert same_bits(layer_norm(x, small, weight_offset=1.0), layer_norm(x, small.float() + 1))


def test_ill_conditioned_rows_keep_their_variance() -> None:
    # Mean 1e4 times the deviation: a one-pass sum of squares would lose every digit of the variance.
    x, weight, bias = _inputs(8, 768, torch.float32, shift=1e4)
    exact = layer_norm_reference(x.double(), weight.double(), bias.double())
    error = (layer_norm(x, weight, bias).double() - exact).abs().max().item()
    # Rounding the mean costs |mean| * 2^-24 = 6e-4 of a deviation, times the largest weight; two passes add
    # no more.
    assert error < 4 * 1e4 * 2.0**-24 * weight.abs().max().item()


def test_special_values_stay_in_their_row() -> None:
    x, weight, bias = _inputs(4, 40, torch.float32)
    clean = layer_norm(x, weight, bias)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got = layer_norm(x, weight, bias)
    assert got[1].isnan().all() and got[2].isnan().all()
    assert same_bits(got[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_run(threads: None, dtype: torch.dtype) -> None:
    x, weight, bias = _inputs(1000, 768, dtype)
    grad = torch.randn(1000, 768).to(dtype)

    def step() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = layer_norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    assert_same_for_threads(step)


def test_row_does_not_depend_on_its_batch() -> None:
    x, weight, bias = _inputs(300, 100, torch.float32)
    whole = layer_norm(x, weight, bias)
    for row in (0, 17, 299):
        assert same_bits(whole[row : row + 1], layer_norm(x[row : row + 1], weight, bias))


def test_misaligned_and_strided_inputs() -> None:
    base = torch.randn(20 * 200 + 1)
    x = base[1:].view(20, 200)[:, :77]
    weight = torch.randn(78)[1:]
    check_against_float64(layer_norm, layer_norm_reference, [x, weight], [torch.randn(20, 77)], terms=77)
    assert same_bits(layer_norm(x, weight), layer_norm(x.contiguous(), weight.clone()))
    transposed = torch.randn(30, 20).t()
    assert same_bits(layer_norm(transposed), layer_norm(transposed.contiguous()))


def test_numpy_arrays_and_explicit_backward() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, weight, bias = _inputs(6, 50, torch.float32)
    grad = torch.randn(6, 50)
    y = layer_norm(x.numpy(), weight.numpy(), bias.numpy())
    assert isinstance(y, np.ndarray)
    assert same_bits(torch.from_numpy(y), layer_norm(x, weight, bias))
    stats = layer_norm_stats(x.numpy())
    gradients = layer_norm_backward(grad.numpy(), x.numpy(), weight.numpy(), stats)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(layer_norm(*leaves), leaves, grad)
    for a, b in zip(gradients, expected, strict=True):
        assert same_bits(torch.from_numpy(a), b)
    centred = layer_norm(*(t.numpy() for t in (x, weight, bias)), weight_offset=1.0)
    assert same_bits(torch.from_numpy(centred), layer_norm(x, weight + 1, bias))
    gradients = layer_norm_backward(grad.numpy(), x.numpy(), weight.numpy(), stats, weight_offset=1.0)
    whole = layer_norm_backward(grad.numpy(), x.numpy(), (weight + 1).numpy(), stats)
    for a, b in zip(gradients, whole, strict=True):
        assert same_bits(torch.from_numpy(a), torch.from_numpy(b))
    half = x.numpy().astype(ml_dtypes.bfloat16)
    assert layer_norm(half).dtype == ml_dtypes.bfloat16
    assert np.array_equal(
        layer_norm(half).view(np.uint16), layer_norm(x.bfloat16()).view(torch.uint16).numpy()
    )


def test_opcheck_and_gradcheck() -> None:
    x, weight, bias = (t.requires_grad_() for t in _inputs(3, 8, torch.float32))
    residual = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.gptcore.layer_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.gptcore.add_layer_norm.default, (x, residual, weight, bias, 1e-5, 1.0))
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    torch.autograd.gradcheck(layer_norm_reference, doubles)
    torch.autograd.gradcheck(lambda *a: layer_norm_reference(*a, weight_offset=1.0), doubles)


def test_compiles_into_one_graph() -> None:
    inputs = [*_inputs(9, 33, torch.float32), torch.randn(9, 33)]

    def block(x, w, b, r):
        y, h = ops.layer_norm(x, w, b, residual=r)
        return y * 2 + ops.layer_norm(h, w, b, weight_offset=1.0)

    eager = [t.clone().requires_grad_() for t in inputs]
    compiled = [t.clone().requires_grad_() for t in inputs]
    torch.autograd.backward(block(*eager).sum())
    torch.autograd.backward(torch.compile(block, fullgraph=True)(*compiled).sum())
    for a, b in zip(eager, compiled, strict=True):
        assert same_bits(a.grad, b.grad)


def test_second_derivative_is_refused_with_a_sentence() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


BAD = [
    (
        lambda: layer_norm(torch.randn(3, 4).double()),
        TypeError,
        "argument 'x': got float64, expected float32 or",
    ),
    (
        lambda: layer_norm(torch.randn(3, 4), torch.randn(5)),
        ValueError,
        "'weight'.*shape \\(5,\\), expected.*\\(4,\\)",
    ),
    (lambda: layer_norm(torch.randn(3, 4), torch.randn(4), torch.randn(4).bfloat16()), TypeError, "'bias'"),
    (lambda: layer_norm(torch.randn(3, 4), residual=torch.randn(3, 5)), ValueError, "'residual'"),
    (lambda: layer_norm(torch.randn(3, 0)), ValueError, "at least 1 element"),
    (lambda: layer_norm(torch.randn(3, 4), eps=-1.0), ValueError, "'eps'.*0 or more"),
    (
        lambda: layer_norm(torch.randn(3, 4), weight_offset=1.0),
        ValueError,
        "'weight_offset'.*without 'weight'",
    ),
    (
        lambda: layer_norm(torch.randn(3, 4), torch.ones(4), weight_offset=float("nan")),
        ValueError,
        "'weight_offset': got nan, expected a finite",
    ),
    (lambda: layer_norm(torch.randn(3, 4, dtype=torch.complex64)), TypeError, "complex"),
    (lambda: layer_norm(torch.empty(3, 4, device="meta")), TypeError, "cannot read .*meta"),
    (lambda: layer_norm(torch.eye(4).to_sparse()), TypeError, "sparse_coo.*expected a dense one"),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_read_only_output_is_refused_and_untouched() -> None:
    out = np.full((2, 3), 7.0, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="'out': got a read-only array"):
        layer_norm(np.ones((2, 3), np.float32), out=out)
    assert (out == 7).all()


def test_out_form_writes_there_and_refuses_gradients() -> None:
    x, weight, bias = _inputs(3, 9, torch.float32)
    out = torch.empty(3, 9)
    assert layer_norm(x, weight, bias, out=out) is out
    assert same_bits(out, layer_norm(x, weight, bias))
    with pytest.raises(RuntimeError, match="out="):
        layer_norm(x, weight.requires_grad_(), bias, out=out)


def test_the_isas_agree_within_rounding() -> None:
    x, weight, bias = _inputs(11, 333, torch.float32)
    results = []
    before = backend.isa()
    for name in backend.available_isas():
        backend.set_isa(name)
        results.append(layer_norm(x, weight, bias))
    backend.set_isa(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
