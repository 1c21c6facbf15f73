from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.ops.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_reference
from tests.strides import EDGES, within_larger
from tests.tolerance import assert_close_to_exact, assert_same_for_threads, same_bits

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [*range(1, 34), 63, 64, 65, 127, 129, 1000]


def _inputs(rows: int, classes: int, dtype: torch.dtype, *, scale: float = 2.0):
    logits, targets = (torch.randn(rows, classes) * scale).to(dtype), torch.randint(0, classes, (rows,))
    targets[1::4] = -100
    return logits, targets


def _step(function, logits, targets, **options) -> list[torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, targets, **options)
    grad = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaf, grad.to(loss.dtype))]


def _double(options: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def _check(logits, targets, edges: tuple[int, int] = (0, 0), **options) -> None:
    def step(function, logits, options) -> list[torch.Tensor]:
        def of_targets(x, _, **keywords):
            return within_larger(lambda x: function(x, targets, **keywords), edges)(x)

        return _step(of_targets, logits, targets, **options)

    got = step(cross_entropy, logits, options)
    exact = step(cross_entropy_reference, logits.double(), _double(options))
    twin = step(torch.nn.functional.cross_entropy, logits, options)
    # The loss is a difference of numbers of the logits' size, over V terms; a probability errs relatively as they do.
    size = logits.double().abs().max().item() + 3
    classes = logits.shape[1]
    assert_close_to_exact(got[0], exact[0], twin[0], terms=classes, summand=size, what="loss")
    # Target and softmax cancel: what is added up is a row's factor, gradient (<= 1.5) * class weight (0.5 to 1.5),
    # over the sum of weights for a mean.
    kept = max(int((targets != -100).sum()), 1)
    factor = 4.5 / kept if options.get("reduction", "mean") == "mean" else 2.25
    summand = (1 + size) * factor
    assert_close_to_exact(got[1], exact[1], twin[1], terms=4, summand=summand, what="dlogits")


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_width_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    for classes in WIDTHS:
        _check(*_inputs(5, classes, dtype))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), classes=st.integers(1, 90), dtype=st.sampled_from(DTYPES),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]), weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]), edges=EDGES, seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape_stride_and_option(
    rows, classes, dtype, smoothing, weighted, reduction, edges, seed
) -> None:
    torch.manual_seed(seed)
    weight = (torch.rand(classes) + 0.5).to(dtype) if weighted else None
    logits, targets = _inputs(rows, classes, dtype)
    _check(logits, targets, edges, weight=weight, label_smoothing=smoothing, reduction=reduction)


def test_no_rows_give_what_torch_gives() -> None:
    logits, targets = torch.empty(0, 5, requires_grad=True), torch.empty(0, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        loss = cross_entropy(logits, targets, reduction=reduction)
        expected = torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.shape == (0, 5)


def test_agrees_with_torch_in_value_dtype_and_ignored_rows() -> None:
    for dtype in DTYPES:
        logits, targets = _inputs(30, 70, dtype)
        for options in (
            {},
            {"reduction": "none"},
            {"label_smoothing": 0.3, "weight": torch.rand(70).to(dtype)},
        ):
            ours = cross_entropy(logits, targets, **options)
            theirs = torch.nn.functional.cross_entropy(logits, targets, **options)
            torch.testing.assert_close(ours, theirs)
    assert cross_entropy(logits, torch.full((30,), -100)).isnan()
    none = _step(cross_entropy, logits, torch.full((30,), -100))
    assert none[0].isnan() and (none[1] == 0).all()
    assert cross_entropy(logits[:0], targets[:0], reduction="sum") == 0


def test_extreme_logits(isa: str) -> None:
    logits, targets = _inputs(8, 50, torch.float32)
    targets = targets.clamp(min=0)
    _check(logits * 1e4, targets)  # exponentials only work relative to the maximum
    logits[2, 1:] = -float("inf")
    targets[2] = 0
    clean = cross_entropy(logits, targets, reduction="none")
    assert clean[2] == 0
    logits[3, 4], logits[5, 6] = float("nan"), float("inf")
    targets[6], logits[6, 0] = -100, float("nan")
    got, gradient = _step(cross_entropy, logits, targets, reduction="none")
    assert got[3].isnan() and not got[5].isfinite() and got[6] == 0 and (gradient[6] == 0).all()
    assert same_bits(got[[0, 1, 2, 4, 7]], clean[[0, 1, 2, 4, 7]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_the_least_number_wherever_rows_begin(isa: str, dtype: torch.dtype) -> None:
    classes, least = 301, torch.finfo(dtype).min
    logits = torch.full((9, classes), least, dtype=dtype)
    gradient = _step(cross_entropy, logits, torch.arange(9), reduction="sum")[1]
    assert gradient.isfinite().all()  # lse is the least number itself, which has no place for log(classes)
    logits[:, 260] = 1
    loss, gradient = _step(cross_entropy, logits, torch.full((9,), 260), reduction="none")
    assert (loss == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_threads_runs_and_batches(isa: str, threads: None, dtype: torch.dtype) -> None:
    logits, targets = _inputs(200, 333, dtype)
    assert_same_for_threads(lambda: _step(cross_entropy, logits, targets, label_smoothing=0.1))
    whole = _step(cross_entropy, logits, targets, reduction="sum")[1]
    losses = cross_entropy(logits, targets, reduction="none")
    for pick in ([0], [7, 3], list(range(100, 199))):
        part = _step(cross_entropy, logits[pick], targets[pick], reduction="sum")[1]
        assert same_bits(part, whole[pick])
        assert same_bits(cross_entropy(logits[pick], targets[pick], reduction="none"), losses[pick])


def test_misaligned_and_strided_rows() -> None:
    base, targets = torch.randn(20 * 90 + 1), torch.randint(0, 77, (20,))
    logits = base[1:].view(20, 90)[:, :77]
    for a, b in zip(
        _step(cross_entropy, logits, targets), _step(cross_entropy, logits.contiguous(), targets), strict=True
    ):
        assert same_bits(a, b)
    turned = torch.randn(77, 20).t()
    assert same_bits(cross_entropy(turned, targets), cross_entropy(turned.contiguous(), targets))


def test_numpy_arrays() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits, targets = _inputs(9, 40, torch.float32)
    loss = cross_entropy(logits.numpy(), targets.numpy(), reduction="none")
    assert isinstance(loss, np.ndarray)
    expected = _step(cross_entropy, logits, targets, reduction="none")
    assert same_bits(torch.from_numpy(loss), expected[0])
    grad = np.linspace(0.5, 1.5, 9, dtype=np.float32)
    gradient = cross_entropy_backward(grad, logits.numpy(), targets.numpy(), reduction="none")
    torch.testing.assert_close(torch.from_numpy(gradient), expected[1])
    assert (
        cross_entropy(logits.numpy().astype(ml_dtypes.bfloat16), targets.numpy()).dtype == ml_dtypes.bfloat16
    )


def test_opcheck_gradcheck_second_derivative_and_compile() -> None:
    logits, targets = _inputs(4, 9, torch.float32)
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(torch.ops.gptcore.cross_entropy.default, (leaf, targets, None, -100, 0.1, "mean"))
    torch.autograd.gradcheck(
        lambda x: cross_entropy_reference(x, targets, label_smoothing=0.1), logits.double().requires_grad_()
    )
    (gradient,) = torch.autograd.grad(cross_entropy(leaf, targets), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

    def loss(x):
        return cross_entropy(x * 2, targets)

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    assert same_bits(eager.grad, compiled.grad)


L, T = torch.randn(3, 5), torch.tensor([0, 1, 4])
BAD = [
    (lambda: cross_entropy(L.double(), T), TypeError, "'logits': got float64"),
    (lambda: cross_entropy(L, T[:2]), ValueError, "'targets'"),
    (lambda: cross_entropy(L, T + 1), ValueError, "'targets': got 5 at position 2.*0 to 4 or ignore_index -100"),
    (lambda: cross_entropy(L, T.int()), TypeError, "'targets': got int32"),
    (lambda: cross_entropy(L[:, :0], T), ValueError, "0 classes"),
    (lambda: cross_entropy(L, T, weight=torch.ones(4)), ValueError, "'weight'"),
    (lambda: cross_entropy(L, T, label_smoothing=-0.1), ValueError, "label_smoothing"),
    (lambda: cross_entropy(L, T, reduction="avg"), ValueError, "'avg'"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()
