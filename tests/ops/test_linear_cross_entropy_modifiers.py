"""Weights of tokens and classes, soft-capped logits, a bias, entropy and predicted tokens, with the other options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.ops.linear_cross_entropy import (
    LinearCrossEntropyOptions,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_reference,
    token_logprobs,
)
from tests.ops.linear_cross_entropy_cases import DTYPES, SHAPES, check, inputs, step
from tests.tolerance import assert_same_for_threads, same_bits

# Of these rows the eager f32 forward makes the gradients of 512 and then of the rest.
MANY = (600, 33, 700)


def _mask(rows: int, classes: int) -> dict[str, Any]:
    """Weights of which a third is 0; the sum is not."""
    weight = torch.rand(rows) + 0.5
    weight[2::3] = 0.0
    return {"token_weight": weight, "z_loss": 1e-2}


def _advantages(rows: int, classes: int) -> dict[str, Any]:
    return {"token_weight": torch.randn(rows), "reduction": "sum", "label_smoothing": 0.1, "logit_scale": 0.5}


def _per_token(rows: int, classes: int) -> dict[str, Any]:
    return {"token_weight": torch.randn(rows), "reduction": "none", "z_loss": 1e-2}


def _capped(rows: int, classes: int) -> dict[str, Any]:
    """A cap amidst the logits."""
    return {"logit_soft_cap": 3.0, "logit_scale": 0.7, "label_smoothing": 0.1, "z_loss": 1e-2}


def _capped_mask(rows: int, classes: int) -> dict[str, Any]:
    return {"logit_soft_cap": 30.0, **_mask(rows, classes), "reduction": "none"}


def _biased(rows: int, classes: int) -> dict[str, Any]:
    return {"bias": torch.randn(classes), "label_smoothing": 0.1, "z_loss": 1e-2, "logit_scale": 0.7}


def _biased_half(rows: int, classes: int) -> dict[str, Any]:
    return {"bias": torch.randn(classes).bfloat16(), "logit_soft_cap": 4.0, "reduction": "sum"}


def _biased_per_token(rows: int, classes: int) -> dict[str, Any]:
    return {"bias": torch.randn(classes), "logit_soft_cap": 20.0, **_per_token(rows, classes)}


def _observed(rows: int, classes: int) -> dict[str, Any]:
    return {"return_entropy": True, "return_predicted": True, "label_smoothing": 0.1, "z_loss": 1e-2}


def _observed_modified(rows: int, classes: int) -> dict[str, Any]:
    return {"return_entropy": True, "return_predicted": True, **_biased_per_token(rows, classes)}


def _class_weights(rows: int, classes: int) -> dict[str, Any]:
    return {
        "class_weight": torch.rand(classes) + 0.1,
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "logit_scale": 0.7,
    }


def _class_and_token_weights(rows: int, classes: int) -> dict[str, Any]:
    """Class weights without smoothing leave logits and slopes as they are: factors of rows, no more."""
    weights = {"class_weight": (torch.rand(classes) + 0.1).bfloat16()}
    return {**_mask(rows, classes), **weights}


def _everything(rows: int, classes: int) -> dict[str, Any]:
    weights = {"class_weight": torch.rand(classes) + 0.1, "label_smoothing": 0.2}
    return {**_observed_modified(rows, classes), **weights}


REDUCED = [
    _mask,
    _advantages,
    _capped,
    _biased,
    _biased_half,
    _observed,
    _class_weights,
    _class_and_token_weights,
]
MODIFIERS = [*REDUCED, _per_token, _capped_mask, _biased_per_token, _observed_modified, _everything]
Modifiers = Callable[[int, int], dict[str, Any]]


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_on_every_isa(isa: str, dtype: torch.dtype, modifiers: Modifiers) -> None:
    for shape in SHAPES:
        check(*inputs(*shape, dtype), **modifiers(shape[0], shape[2]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), width=st.integers(1, 70), classes=st.integers(1, 600), dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(), classed=st.booleans(), bias=st.sampled_from([None, *DTYPES]), seed=st.integers(0, 2**16),
    cap=st.sampled_from([None, 3.0, 30.0]), scale=st.sampled_from([1.0, 0.5]), smoothing=st.sampled_from([0.0, 0.2]),
    reduction=st.sampled_from(["mean", "sum", "none"]), observed=st.booleans(),
)  # fmt: skip
def test_any_combination(
    rows, width, classes, dtype, weighted, classed, bias, seed, cap, scale, smoothing, reduction, observed
) -> None:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"logit_scale": scale, "label_smoothing": smoothing, "reduction": reduction}
    if weighted:
        options["token_weight"] = torch.rand(rows) + 0.5 if reduction == "mean" else torch.randn(rows)
    if classed:
        options["class_weight"] = torch.rand(classes) + 0.1
    if bias is not None:
        options["bias"] = torch.randn(classes).to(bias)
    if cap is not None:
        options["logit_soft_cap"] = cap
    if observed:
        options |= {"return_entropy": True, "return_predicted": True, "z_loss": 1e-2}
    check(*inputs(rows, width, classes, dtype), **options)


@pytest.mark.parametrize("modifiers", MODIFIERS)
def test_many_rows_match_float64(isa: str, modifiers: Modifiers) -> None:
    check(*inputs(*MANY, torch.float32), **modifiers(MANY[0], MANY[2]))


@pytest.mark.parametrize("modifiers", REDUCED)
@pytest.mark.parametrize("shape", [MANY, (300, 100, 700), (7, 5, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_made_in_the_forward_are_the_backwards_bits(isa: str, dtype, shape, modifiers) -> None:
    x, weight, targets = inputs(*shape, dtype)
    options = modifiers(shape[0], shape[2])
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    if "bias" in options:
        options["bias"].requires_grad_()
        leaves.append(options["bias"])
    out = linear_cross_entropy(*leaves[:2], targets, **options)
    got = torch.autograd.grad(out.loss + out.z_loss, leaves)
    if "bias" in options:
        options["bias"] = options["bias"].detach()
    plain = linear_cross_entropy(x, weight, targets, **options)
    for a, b in zip(out, plain, strict=True):
        assert (a is None and b is None) or same_bits(a.detach(), b)
    ones = torch.ones(()), torch.ones(())
    again = linear_cross_entropy_backward(*ones, x, weight, targets, out.lse, **options)
    assert all(same_bits(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("shape, dtype", [(MANY, torch.float32), (MANY, torch.bfloat16)])
def test_same_bits_for_every_thread_count_and_run(isa: str, threads: None, shape, dtype, modifiers) -> None:
    x, weight, targets = inputs(*shape, dtype)
    options = modifiers(shape[0], shape[2])

    def run() -> list[torch.Tensor]:
        out, gradients = step(linear_cross_entropy, x, weight, targets, options)
        return [*out, *gradients]

    assert_same_for_threads(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    if isa == "simt":
        pytest.skip(
            "on a GPU the products are the library's, whose bits may change with their number of rows"
        )
    x, weight, targets = inputs(200, 50, 700, dtype)
    options = _everything(200, 700)
    tokens = options.pop("token_weight")

    def rows(pick: list[int]) -> list[torch.Tensor]:
        leaf = x[pick].requires_grad_()
        out = linear_cross_entropy(leaf, weight, targets[pick], token_weight=tokens[pick], **options)
        (dx,) = torch.autograd.grad((out.loss + out.z_loss).sum(), leaf)
        return [*out, dx]

    whole = rows(list(range(200)))
    for pick in ([0], [7, 3], [199, *range(100)]):
        for a, b in zip(rows(pick), whole, strict=True):
            assert same_bits(a, b[pick])


def test_ignored_tokens_alone_give_gradients_of_zero() -> None:
    for dtype in DTYPES:
        x, weight, _ = inputs(10, 8, 20, dtype)
        for rows in (10, 0):
            targets = torch.full((rows,), -100)
            for modifiers in (_biased, _everything):
                options = modifiers(rows, 20)
                out, gradients = step(linear_cross_entropy, x[:rows], weight, targets, options)
                assert out[0].isnan() if "reduction" not in options else (out[0] == 0).all()
                assert all((g == 0).all() for g in gradients)
                assert len(out) == 4 or ((out[4] == 0).all() and (out[5] == -1).all())


@pytest.mark.parametrize("modifiers", MODIFIERS)
def test_main_grad_takes_the_unrounded_gradient(modifiers: Modifiers) -> None:
    for dtype in DTYPES:
        x, weight, targets = inputs(40, 32, 90, dtype)
        options = modifiers(40, 90)
        plain = weight.clone().requires_grad_()
        linear_cross_entropy(x, plain, targets, **options).loss.sum().backward()
        weight.requires_grad_()
        weight.main_grad = torch.zeros(90, 32)
        linear_cross_entropy(x, weight, targets, **options).loss.sum().backward()
        assert weight.grad is None and same_bits(weight.main_grad.to(dtype), plain.grad)
        if "bias" in options:
            leaf = options["bias"].clone().requires_grad_()
            linear_cross_entropy(x, weight, targets, **{**options, "bias": leaf}).loss.sum().backward()
            assert leaf.grad.abs().max() > 0


def _numpy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype != torch.bfloat16:
        return value.numpy()
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return value.float().numpy().astype(ml_dtypes.bfloat16)


def _same_values(array: Any, tensor: torch.Tensor) -> bool:
    assert isinstance(array, (np.ndarray, np.generic))
    half = tensor.dtype == torch.bfloat16
    return same_bits(
        torch.from_numpy(np.asarray(array, np.float32 if half else None)), tensor.float() if half else tensor
    )


@pytest.mark.parametrize("modifiers", MODIFIERS)
def test_numpy_arrays_give_the_same_bits(modifiers: Modifiers) -> None:
    x, weight, targets = inputs(9, 20, 40, torch.float32)
    options = modifiers(9, 40)
    arrays = {k: _numpy(v) for k, v in options.items()}
    out = linear_cross_entropy(x, weight, targets, **options)
    got = linear_cross_entropy(x.numpy(), weight.numpy(), targets.numpy(), **arrays)
    assert all(_same_values(a, b) for a, b in zip(got, out, strict=True) if b is not None)
    grads = [torch.rand(out.loss.shape) + 0.5 for _ in range(2)]
    gradients = linear_cross_entropy_backward(*grads, x, weight, targets, out.lse, **options)
    got = linear_cross_entropy_backward(
        *(g.numpy() for g in grads), x.numpy(), weight.numpy(), targets.numpy(), got.lse, **arrays
    )
    assert all(_same_values(a, b) for a, b in zip(got, gradients, strict=True))


@pytest.mark.parametrize("modifiers", MODIFIERS)
def test_compiles_into_one_graph(modifiers: Modifiers) -> None:
    x, weight, targets = inputs(9, 16, 33, torch.float32)
    options = modifiers(9, 33)

    def loss(a, b):
        out = linear_cross_entropy(a * 2, b, targets, **options)
        return (out.loss + out.z_loss).sum(), [o for o in out[2:] if o is not None]

    eager = [t.clone().requires_grad_() for t in (x, weight)]
    compiled = [t.clone().requires_grad_() for t in (x, weight)]
    total, others = loss(*eager)
    total.backward()
    torch.compiler.reset()  # each case is a graph of its own, and there is a limit
    total, compiled_others = torch.compile(loss, fullgraph=True)(*compiled)
    total.backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(eager, compiled, strict=True))
    assert all(same_bits(a, b) for a, b in zip(others, compiled_others, strict=True))


def test_opcheck_and_gradcheck() -> None:
    x, weight, targets = inputs(4, 6, 9, torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    bias = torch.randn(9).requires_grad_()
    modifiers = (torch.rand(4), bias, torch.rand(9), 2.0, True, True)
    op = torch.ops.gptcore.linear_cross_entropy.default
    torch.library.opcheck(op, (*leaves, targets, -100, 0.1, 0.01, 1.0, "mean", *modifiers))
    for modifiers in MODIFIERS:
        options = modifiers(4, 9)
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        torch.autograd.gradcheck(
            lambda a, b, options=options: linear_cross_entropy_reference(a, b, targets, **options)[:2],
            doubles,
        )


def test_token_weights_are_factors_of_the_loss_alone() -> None:
    x, weight, targets = inputs(50, 24, 130, torch.float32)
    each = linear_cross_entropy(x, weight, targets, reduction="none", z_loss=1e-2)
    w = torch.rand(50)
    out = linear_cross_entropy(x, weight, targets, reduction="none", z_loss=1e-2, token_weight=w)
    torch.testing.assert_close(out.loss, each.loss * w)
    torch.testing.assert_close(out.z_loss, each.z_loss * w)
    assert same_bits(out.logprobs, each.logprobs) and same_bits(out.lse, each.lse)
    kept = targets >= 0
    mean = linear_cross_entropy(x, weight, targets, token_weight=w).loss
    torch.testing.assert_close(mean, (w * each.loss)[kept].sum() / w[kept].sum())


def test_weights_of_one_and_scaled_weights_change_no_bit() -> None:
    x, weight, targets = inputs(*MANY, torch.float32)
    plain = step(linear_cross_entropy, x, weight, targets, {"z_loss": 1e-2})
    for factor in (1.0, 4.0):  # the mean divides by the sum of the weights
        options = {"z_loss": 1e-2, "token_weight": torch.full((MANY[0],), factor)}
        got = step(linear_cross_entropy, x, weight, targets, options)
        for a, b in zip((*got[0], *got[1]), (*plain[0], *plain[1]), strict=True):
            assert same_bits(a, b)


def test_token_weights_of_ignored_tokens_are_not_looked_at() -> None:
    x, weight, targets = inputs(30, 8, 20, torch.float32)
    w = torch.where(targets < 0, float("nan"), 1.5)
    out, gradients = step(linear_cross_entropy, x, weight, targets, {"token_weight": w})
    assert out[0].isfinite() and all(g.isfinite().all() for g in gradients)
    nothing = torch.zeros(30)
    assert linear_cross_entropy(x, weight, targets, token_weight=nothing).loss.isnan()
    assert linear_cross_entropy(x, weight, targets, token_weight=nothing, reduction="sum").loss == 0


def test_token_weights_take_the_targets_shape_and_any_stride() -> None:
    x, weight, targets = torch.randn(3, 4, 8), torch.randn(20, 8), torch.randint(0, 20, (3, 4))
    w = torch.rand(3, 8)[:, ::2]
    got = linear_cross_entropy(x, weight, targets, token_weight=w)
    flat = linear_cross_entropy(x, weight, targets, token_weight=w.contiguous().view(-1))
    assert same_bits(got.loss, flat.loss)


def test_autocast_leaves_token_weights_in_f32() -> None:
    x, weight, targets = inputs(9, 16, 33, torch.float32)
    w = torch.full((9,), 1.001)  # 1 in bf16
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_cross_entropy(x, weight, targets, token_weight=w, reduction="sum")
    plain = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets, token_weight=w, reduction="sum")
    assert same_bits(out.loss, plain.loss)


def test_soft_cap_is_accurate_at_every_size(isa: str) -> None:
    # Of one class lse is its logit. 5 ulp of tanh, 2 of the quotient and the product with the cap.
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 3, 4000), torch.tensor([0.0, -0.0])])
    for cap in (1.0, 30.0, 1e-3):
        out = linear_cross_entropy(
            x[:, None], torch.ones(1, 1), torch.zeros(len(x), dtype=torch.int64), logit_soft_cap=cap
        )
        exact = cap * torch.tanh(x.double() / cap)
        error = (out.lse.double() - exact).abs()
        assert (error <= 7 * 2.0**-23 * exact.abs()).all(), (error / exact.abs()).nan_to_num().max()
        assert (out.lse.abs() <= cap).all()


def test_soft_cap_takes_what_no_logit_should_be(isa: str) -> None:
    x = torch.tensor([[float("inf")], [-float("inf")], [3e38], [float("nan")]])
    out = linear_cross_entropy(
        x, torch.ones(1, 1), torch.zeros(4, dtype=torch.int64), logit_soft_cap=5.0, reduction="none"
    )
    assert out.lse[:3].tolist() == [5.0, -5.0, 5.0] and out.lse[3].isnan()


def test_bias_is_that_of_a_linear_layer(isa: str) -> None:
    x, weight, targets = inputs(50, 24, 130, torch.float32)
    bias = torch.randn(130)
    got = linear_cross_entropy(x, weight, targets, bias=bias).loss
    logits = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits, targets))


def test_bias_of_minus_infinity_bars_a_class(isa: str) -> None:
    x, weight, targets = inputs(40, 24, 300, torch.float32)
    bias = torch.zeros(300)
    bias[:256] = -float("inf")  # a whole block of the vocabulary, and more
    targets = torch.where(targets < 0, -100, 256 + targets % 44)
    out, (dx, dweight, dbias) = step(linear_cross_entropy, x, weight, targets, {"bias": bias})
    short, (short_dx, short_dweight) = step(
        linear_cross_entropy, x, weight[256:], torch.where(targets < 0, -100, targets - 256), {}
    )
    for a, b in zip([*out, dx, dweight[256:]], [*short, short_dx, short_dweight], strict=True):
        torch.testing.assert_close(a, b)
    assert (dweight[:256] == 0).all() and (dbias[:256] == 0).all()


def test_large_bias_leaves_no_trace_in_padding(isa: str) -> None:
    # Tokens are padded to 32: exp(bias) of the padding must not become infinity times 0.
    for dtype in DTYPES:
        x, weight, targets = inputs(5, 8, 40, dtype)
        bias = torch.zeros(40)
        bias[3] = 1000.0
        _, gradients = step(linear_cross_entropy, x, weight, targets, {"bias": bias, "reduction": "none"})
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_wanted_gradients_are_made(dtype: torch.dtype) -> None:
    for rows in (40, 600):
        x, weight, targets = inputs(rows, 33, 90, dtype)
        tensors = {"x": x, "weight": weight, "bias": torch.randn(90)}
        _, whole = step(linear_cross_entropy, x, weight, targets, {"bias": tensors["bias"]})
        for wanted in ([0], [1], [2], [0, 2], [1, 2]):
            leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors.values())]
            out = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2])
            grads = torch.rand((), generator=torch.Generator().manual_seed(1)) + 0.5
            got = torch.autograd.grad(out.loss, [leaves[i] for i in wanted], grads)
            assert all(same_bits(g, whole[i]) for g, i in zip(got, wanted, strict=True))


def test_the_first_of_equal_logits_is_predicted_wherever_rows_begin(isa: str) -> None:
    x, targets = torch.ones(5, 1), torch.zeros(5, dtype=torch.int64)
    for first in (0, 1, 2, 3, 5, 127, 130, 131, 257, 299, 300):
        weight = torch.zeros(301, 1)
        weight[first:] = torch.tensor([1.0, 0.5]).repeat(151)[: 301 - first, None]
        got = linear_cross_entropy(x, weight, targets, return_predicted=True).predicted
        assert (got == first).all(), (first, got)


def test_entropy_and_predicted_change_no_other_bit(isa: str) -> None:
    for dtype in DTYPES:
        x, weight, targets = inputs(*MANY, dtype)
        options = {"label_smoothing": 0.1, "z_loss": 1e-2}
        plain = step(linear_cross_entropy, x, weight, targets, options)
        asked = {"return_entropy": True, "return_predicted": True}
        got = step(linear_cross_entropy, x, weight, targets, {**options, **asked})
        for a, b in zip([*plain[0], *plain[1]], [*got[0][:4], *got[1]], strict=True):
            assert same_bits(a, b)
        for name in asked:
            alone = linear_cross_entropy(x, weight, targets, **{name: True})
            assert [alone.entropy is None, alone.predicted is None] == [name != a for a in asked]
            value = alone.entropy if alone.predicted is None else alone.predicted
            assert same_bits(value, got[0][4 if name == "return_entropy" else 5])


def test_entropy_of_certain_even_and_barred_tokens(isa: str) -> None:
    # 600 classes are three blocks of the vocabulary.
    x, weight = torch.ones(1, 1), torch.zeros(600, 1)
    even = linear_cross_entropy(x, weight, torch.tensor([0]), return_entropy=True, return_predicted=True)
    assert abs(even.entropy.item() - np.log(600)) < 2e-6 and even.predicted.item() == 0
    weight[500] = 200.0
    sure = linear_cross_entropy(x, weight, torch.tensor([0]), return_entropy=True, return_predicted=True)
    assert sure.entropy.item() == 0 and sure.predicted.item() == 500
    bias = torch.full((600,), -float("inf"))
    bias[[300, 550]] = 1.0
    weight[500] = 0.0
    two = linear_cross_entropy(
        x, weight, torch.tensor([300]), bias=bias, return_entropy=True, return_predicted=True
    )
    assert abs(two.entropy.item() - np.log(2)) < 1e-6 and two.predicted.item() == 300


def test_lowest_of_equal_classes_is_predicted(isa: str) -> None:
    x = torch.ones(40, 1)
    for classes, best in ((700, [3, 4, 650]), (700, [255, 256]), (5, [4]), (300, [256, 299])):
        weight = torch.zeros(classes, 1)
        weight[best] = 2.0
        for dtype in DTYPES:
            out = linear_cross_entropy(
                x.to(dtype), weight.to(dtype), torch.zeros(40, dtype=torch.int64), return_predicted=True
            )
            assert (out.predicted == best[0]).all()


def test_token_logprobs_with_entropy_and_predicted_tokens() -> None:
    x, weight, targets = inputs(12, 16, 30, torch.float32)
    x.requires_grad_()
    options = {"logit_scale": 0.7, "bias": torch.randn(30), "logit_soft_cap": 5.0}
    out = token_logprobs(x, weight, targets, return_entropy=True, return_predicted=True, **options)
    logits = 0.7 * torch.nn.functional.linear(x, weight, options["bias"])
    exact = torch.log_softmax(5.0 * torch.tanh(logits / 5.0), -1)
    kept = targets >= 0
    torch.testing.assert_close(out.logprobs, exact.gather(1, targets.clamp(min=0)[:, None])[:, 0] * kept)
    torch.testing.assert_close(out.entropy, -(exact.exp() * exact).sum(-1).detach() * kept)
    assert torch.equal(out.predicted, torch.where(kept, exact.argmax(-1), -1))
    assert out.logprobs.requires_grad and not out.entropy.requires_grad and not out.predicted.requires_grad
    assert same_bits(token_logprobs(x, weight, targets, **options), out.logprobs)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_are_those_of_torch(smoothing: float, reduction: str) -> None:
    x, weight, targets = inputs(50, 24, 130, torch.float32)
    w = torch.rand(130)
    w[::7] = 0.0
    options = {"label_smoothing": smoothing, "reduction": reduction}
    results = []
    for loss in (
        lambda a, b: linear_cross_entropy(a, b, targets, class_weight=w, **options).loss,
        lambda a, b: torch.nn.functional.cross_entropy(a @ b.T, targets, weight=w, **options),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        value = loss(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_class_weights_of_one_change_the_losses_by_roundings_only() -> None:
    x, weight, targets = inputs(*MANY, torch.float32)
    for options in ({}, {"label_smoothing": 0.1}):
        plain = step(linear_cross_entropy, x, weight, targets, options)
        got = step(linear_cross_entropy, x, weight, targets, {**options, "class_weight": torch.ones(MANY[2])})
        for a, b in zip((*got[0], *got[1]), (*plain[0], *plain[1]), strict=True):
            assert same_bits(a, b) if not options else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_options_are_those_of_the_signature() -> None:
    assert set(LinearCrossEntropyOptions.__annotations__) == set(linear_cross_entropy.__kwdefaults__)
    with pytest.raises(TypeError, match="linear_cross_entropy: got an unexpected keyword argument 'zloss'"):
        linear_cross_entropy_reference(X, W, T, zloss=1.0)


X, W, T = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
BAD = [
    ({"token_weight": torch.ones(2)}, ValueError, r"'token_weight': got shape \(2,\), expected shape \(3,\)"),
    ({"token_weight": torch.ones(3).double()}, TypeError, "'token_weight': got float64, expected float32"),
    ({"bias": torch.ones(3)}, ValueError, r"'bias': got shape \(3,\), expected shape \(5,\)"),
    ({"bias": torch.ones(5).double()}, TypeError, "'bias': got float64, expected float32 or bfloat16"),
    ({"class_weight": torch.ones(3)}, ValueError, r"'class_weight': got shape \(3,\), expected shape \(5,\)"),
    (
        {"class_weight": torch.ones(5).double()},
        TypeError,
        "'class_weight': got float64, expected float32 or bfloat16",
    ),
    ({"logit_soft_cap": 0.0}, ValueError, "'logit_soft_cap': got 0.0.*, expected None or a number above 0"),
    ({"logit_soft_cap": -3.0}, ValueError, "'logit_soft_cap': got -3.0"),
    ({"logit_soft_cap": float("nan")}, ValueError, "'logit_soft_cap': got nan"),
    ({"logit_soft_cap": float("inf")}, ValueError, "'logit_soft_cap': got inf"),
]


@pytest.mark.parametrize("options, error, text", BAD)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    for op in (
        linear_cross_entropy,
        lambda *a, **o: linear_cross_entropy_backward(None, None, *a, X[:, 0], **o),
    ):
        with pytest.raises(error, match=text):
            op(X, W, T, **options)
