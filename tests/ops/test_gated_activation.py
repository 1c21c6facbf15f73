from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend, ops
from gptcore.ops import gated_activation as op
from tests.strides import EDGES, within_larger
from tests.tolerance import assert_same_for_threads, check_against_float64, same_bits

DTYPES = [torch.float32, torch.bfloat16]
# Every width from none to beyond two AVX-512 vectors.
WIDTHS = [*range(34), 63, 64, 65]


def _packed(reference):
    """The reference of a packed form, from that of the separate one."""

    def function(gate_up, bias=None):
        half = gate_up.shape[-1] // 2
        biases = (None, None) if bias is None else (bias[:half], bias[half:])
        return reference(gate_up[..., :half], gate_up[..., half:], *biases)

    return function


# name: kernel, reference, number of (..., F) inputs, whether the last dimension is doubled
FORMS = {
    "gelu_tanh": (op.gelu, op.gelu_reference, 1, 1),
    "gelu_erf": (
        lambda *a: op.gelu(*a, approximate="none"),
        lambda *a: op.gelu_reference(*a, approximate="none"),
        1,
        1,
    ),
    "silu": (op.silu, op.silu_reference, 1, 1),
    "relu": (op.relu, op.relu_reference, 1, 1),
    "swiglu": (op.swiglu, op.swiglu_reference, 2, 1),
    "geglu": (op.geglu, op.geglu_reference, 2, 1),
    "swiglu_packed": (op.swiglu_packed, _packed(op.swiglu_reference), 1, 2),
    "geglu_packed": (op.geglu_packed, _packed(op.geglu_reference), 1, 2),
}


def _inputs(form: str, rows: int, width: int, dtype: torch.dtype, bias: bool) -> list[torch.Tensor]:
    _, _, count, factor = FORMS[form]
    inputs = [(torch.randn(rows, factor * width) * 2).to(dtype) for _ in range(count)]
    return inputs + [torch.randn(factor * width).to(dtype) for _ in range(count)] if bias else inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_matches_float64_at_every_width_on_every_isa(isa: str, form: str, dtype: torch.dtype) -> None:
    kernel, reference, _, _ = FORMS[form]
    for width in WIDTHS:
        inputs = _inputs(form, 3, width, dtype, bias=width % 2 == 0)
        check_against_float64(kernel, reference, inputs, [torch.randn(3, width)], terms=3)


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    lead=st.lists(st.integers(0, 9), max_size=3),
    width=st.integers(0, 90),
    bias=st.sampled_from(["none", "same", "float32"]),
    dtype=st.sampled_from(DTYPES),
    edges=EDGES,
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_option(form: str, lead, width: int, bias: str, dtype, edges, seed: int) -> None:
    torch.manual_seed(seed)
    kernel, reference, count, factor = FORMS[form]
    rows = math.prod(lead)
    inputs = _inputs(form, rows, width, dtype, bias != "none")
    inputs = [x.view(*lead, factor * width) for x in inputs[:count]] + inputs[count:]
    if bias == "float32":
        inputs = [*inputs[:count], *(b.float() for b in inputs[count:])]

    def in_dtype(*arguments):
        return reference(*arguments).to(arguments[0].dtype)

    kernel, in_dtype = within_larger(kernel, edges), within_larger(in_dtype, edges)
    grads = [torch.randn(*lead, width + sum(edges))]
    check_against_float64(kernel, in_dtype, inputs, grads, terms=max(rows, 1))


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu_erf", "silu", "relu"])
def test_elementwise_accuracy_over_the_whole_range(isa: str, name: str) -> None:
    kernel, reference, _, _ = FORMS[name]
    x = torch.cat(
        [torch.linspace(-20, 20, 40001), torch.logspace(-30, 2, 4001), -torch.logspace(-30, 2, 4001)]
    )
    leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    got, exact = kernel(leaf), reference(exact_leaf)
    # Against |x|: the factor of x is in [0, 1], and its absolute error is a few roundings near 1.
    error = (got.double() - exact).abs() / x.double().abs().clamp(min=1e-30)
    assert error.max().item() < 4 * 2.0**-24
    slope, exact_slope = (
        torch.autograd.grad(got.sum(), leaf)[0],
        torch.autograd.grad(exact.sum(), exact_leaf)[0],
    )
    keep = x != 0  # relu has no derivative there
    # Slopes reach 1.13; the density of gelu's adds one more product of rounded factors.
    assert (slope.double() - exact_slope)[keep].abs().max().item() < 8 * 2.0**-24


@pytest.mark.parametrize(
    "name, limit, bound",
    [
        # Fitted for absolute error: the relative one grows towards the end.
        ("gelu_erf", -3.0, 1e-5),
        ("gelu_erf", -6.0, 1e-4),
        ("gelu_tanh", -3.0, 2e-6),
        ("gelu_tanh", -6.0, 1e-3),
        # An exponent of 80 rounded to 80 * 2^-24.
        ("silu", -80.0, 1e-5),
    ],
)
def test_left_tail_keeps_relative_accuracy(isa: str, name: str, limit: float, bound: float) -> None:
    kernel, reference, _, _ = FORMS[name]
    x = torch.linspace(limit, -0.01, 20001)
    exact = reference(x.double())
    if name == "gelu_erf":  # the reference cancels there, even in float64
        exact = x.double() * torch.special.erfc(-x.double() * 0.5**0.5) / 2
    assert ((kernel(x).double() - exact) / exact).abs().max().item() < bound


def test_special_values_give_limits_and_stay_in_place() -> None:
    x = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 0.0, 1.5])
    for name in ("gelu_tanh", "gelu_erf", "silu", "relu"):
        leaf = x.clone().requires_grad_()
        y = FORMS[name][0](leaf)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
        assert (y[0].isnan() and slope[0].isnan()) or name == "relu", name
        assert y[1] == float("inf") and y[2] == 1e30 and y[3] == 0 and y[4] == 0, name
        assert slope[1:4].tolist() == [1, 1, 0], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["gelu_tanh", "swiglu", "geglu_packed"])
def test_same_bits_for_every_thread_count_and_run(threads: None, form: str, dtype: torch.dtype) -> None:
    inputs = _inputs(form, 500, 300, dtype, bias=True)
    grad = torch.randn(500, 300).to(dtype)

    def step() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = FORMS[form][0](*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    assert_same_for_threads(step)


def test_misaligned_strided_and_fused_inputs() -> None:
    base = torch.randn(20 * 100 + 1)[1:].view(4, 5, 100)
    gate, up = base[..., :50], base[..., 50:]
    y = op.swiglu(gate, up)
    assert same_bits(y, op.swiglu(gate.clone(), up.clone()))
    assert same_bits(y, op.swiglu_packed(base))
    check_against_float64(op.swiglu, op.swiglu_reference, [gate, up], [torch.randn(4, 5, 50)])
    transposed = torch.randn(30, 20).t()
    assert same_bits(op.gelu(transposed), op.gelu(transposed.contiguous()))
    scalar_gradient = torch.randn(7, 9, requires_grad=True)
    op.gelu(scalar_gradient).sum().backward()  # the gradient arrives expanded, all strides 0
    assert scalar_gradient.grad is not None and scalar_gradient.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
def test_empty_inputs_have_empty_gradients_and_no_bias_gradient(form: str, shape: tuple[int, int]) -> None:
    for bias in (False, True):
        leaves = [t.requires_grad_() for t in _inputs(form, *shape, torch.float32, bias)]
        gradients = torch.autograd.grad(FORMS[form][0](*leaves), leaves, torch.zeros(shape))
        assert [g.shape for g in gradients] == [t.shape for t in leaves]
        assert not any(g.any() for g in gradients)


def test_packed_gradient_is_that_of_the_halves() -> None:
    fused = torch.randn(6, 2, 40, requires_grad=True)
    grad = torch.randn(6, 2, 20)
    (packed,) = torch.autograd.grad(op.swiglu_packed(fused), fused, grad)
    (halves,) = torch.autograd.grad(op.swiglu(*fused.chunk(2, -1)), fused, grad)
    assert same_bits(packed, halves)


def test_row_longer_than_a_task_is_split() -> None:
    x, bias = torch.randn(2, 40000), torch.randn(40000)
    whole = op.gelu(x, bias)
    assert same_bits(whole[:, 20000:], op.gelu(x[:, 20000:].clone(), bias[20000:].clone()))


def test_numpy_arrays() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, bias = torch.randn(6, 50), torch.randn(50)
    y = op.gelu(x.numpy(), bias.numpy())
    assert isinstance(y, np.ndarray) and same_bits(torch.from_numpy(y), op.gelu(x, bias))
    half = x.numpy().astype(ml_dtypes.bfloat16)
    packed = op.swiglu_packed(half)
    assert packed.dtype == ml_dtypes.bfloat16 and packed.shape == (6, 25)
    expected = op.swiglu_packed(x.bfloat16()).view(torch.int16)
    assert same_bits(torch.from_numpy(packed.view(np.int16)), expected)


def test_opcheck_and_gradcheck() -> None:
    gate, up = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    call = torch.ops.gptcore.gated_activation.default
    torch.library.opcheck(call, (gate, up, bias, None, op.SILU))
    torch.library.opcheck(call, (gate, None, None, None, op.GELU_ERF + op.PACKED))
    for name in ("gelu_tanh", "gelu_erf", "silu"):
        torch.autograd.gradcheck(FORMS[name][1], (gate.detach().double().requires_grad_(),))


def test_compiles_into_one_graph() -> None:
    inputs = [torch.randn(9, 66), torch.randn(66)]

    def block(x, b):
        return ops.swiglu_packed(x, b) * 2 + ops.gelu(x[..., :33])

    eager = [t.clone().requires_grad_() for t in inputs]
    compiled = [t.clone().requires_grad_() for t in inputs]
    block(*eager).sum().backward()
    torch.compile(block, fullgraph=True)(*compiled).sum().backward()
    for a, b in zip(eager, compiled, strict=True):
        assert same_bits(a.grad, b.grad)


def test_second_derivative_is_refused_with_a_sentence() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(op.gelu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


BAD = [
    (lambda: op.gelu(torch.randn(3, 4).double()), TypeError, "'gate': got float64, expected float32 or"),
    (
        lambda: op.gelu(torch.randn(3, 4), torch.randn(5)),
        ValueError,
        "'gate_bias'.*\\(5,\\), expected.*\\(4,\\)",
    ),
    (lambda: op.swiglu(torch.randn(3, 4), torch.randn(3, 5)), ValueError, "'up'.*shape of 'gate'"),
    (lambda: op.swiglu(torch.randn(3, 4), torch.randn(3, 4).bfloat16()), TypeError, "'up': got bfloat16"),
    (lambda: op.gelu(torch.randn(3, 4), approximate="erf"), ValueError, "'approximate'.*'erf'"),
    (lambda: op.swiglu_packed(torch.randn(3, 5)), ValueError, "'gate_up'.*5, expected an even"),
    (lambda: op.silu(torch.randn(())), ValueError, "a scalar, expected at least 1 dimension"),
    (lambda: op.silu(torch.randn(3, 4), out=torch.empty(3, 5)), ValueError, "'out'"),
    (lambda: op.silu(torch.empty(3, 4, device="meta")), TypeError, "cannot read .*meta"),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_out_form_may_overwrite_its_input_and_refuses_gradients() -> None:
    x = torch.randn(3, 9)
    expected = op.gelu(x)
    assert op.gelu(x, out=x) is x and same_bits(x, expected)
    with pytest.raises(RuntimeError, match="out="):
        op.gelu(x.requires_grad_(), out=torch.empty(3, 9))


def test_the_isas_agree_within_rounding() -> None:
    x = torch.randn(11, 333)
    before = backend.isa()
    results = []
    for name in backend.available_isas():
        backend.set_isa(name)
        results.append(op.gelu(x, approximate="none"))
    backend.set_isa(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


def test_a_broadcast_gradient_of_nothing_is_accepted() -> None:
    x = torch.empty(0, 3, requires_grad=True)
    op.gelu(x).sum().backward()  # its gradient has stride 0 in both dimensions
    assert x.grad is not None and x.grad.shape == (0, 3)
