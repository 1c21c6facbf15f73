from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend
from gptcore.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_reference,
    token_logprobs,
)
from tests.ops.linear_cross_entropy_cases import DTYPES, OPTIONS, SHAPES, check, inputs, step
from tests.tolerance import assert_close_to_exact, assert_same_for_threads, same_bits


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_on_every_isa(isa: str, dtype: torch.dtype, options: dict) -> None:
    for shape in SHAPES:
        check(*inputs(*shape, dtype), **options)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70), width=st.integers(1, 70), classes=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES), f32_weight=st.booleans(), smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    z_loss=st.sampled_from([0.0, 0.01]), reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape_and_option(
    rows, width, classes, dtype, f32_weight, smoothing, z_loss, reduction, seed
) -> None:
    torch.manual_seed(seed)
    x, weight, targets = inputs(rows, width, classes, dtype)
    if f32_weight and dtype == torch.bfloat16:
        got = linear_cross_entropy(x, weight.float(), targets)
        wide = linear_cross_entropy(x.float(), weight.float(), targets)
        assert all(same_bits(a, b) for a, b in zip(got, wide, strict=True))
        return
    check(x, weight, targets, label_smoothing=smoothing, z_loss=z_loss, reduction=reduction)


def test_agrees_with_torch_cross_entropy() -> None:
    x, weight, targets = inputs(50, 24, 130, torch.float32)
    for options in ({}, {"label_smoothing": 0.2}, {"reduction": "sum"}, {"reduction": "none"}):
        ours = linear_cross_entropy(x, weight, targets, **options).loss
        torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(x @ weight.T, targets, **options))


def test_large_logits_do_not_overflow(isa: str) -> None:
    # Logits of several thousand: exponentials only work relative to the maximum.
    for dtype in DTYPES:
        x, weight, targets = inputs(20, 64, 500, dtype)
        out = linear_cross_entropy(x * 100, weight, targets, reduction="none")
        exact = linear_cross_entropy_reference((x * 100).double(), weight.double(), targets, reduction="none")
        # f32 sums of 64 products of size up to 1e3: 8 roundings of about 1e4
        assert_close_to_exact(out.loss, exact.loss, terms=64, summand=1e4)


def test_special_values_stay_in_their_row(isa: str) -> None:
    x, weight, targets = inputs(40, 33, 70, torch.float32, ignored=False)
    clean = linear_cross_entropy(x, weight, targets, reduction="none")
    x[3, 1], x[5, 2], x[7, 0] = float("nan"), float("inf"), float("nan")
    targets[7] = -100
    got = linear_cross_entropy(x, weight, targets, reduction="none")
    assert got.loss[3].isnan() and not got.loss[5].isfinite()
    assert got.loss[7] == 0 and got.lse[7] == 0  # ignored, so not even looked at
    others = [n for n in range(40) if n not in (3, 5, 7)]
    assert same_bits(got.loss[others], clean.loss[others])


def test_minus_infinity_is_a_class_that_cannot_be(isa: str) -> None:
    # 300 classes are two blocks of the vocabulary; one is -inf throughout.
    x, weight = torch.ones(2, 4), torch.randn(300, 4)
    weight[:256] = -float("inf")
    out = linear_cross_entropy(x, weight, torch.tensor([290, 299]))
    expected = torch.nn.functional.cross_entropy(x @ weight[256:].T, torch.tensor([34, 43]))
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_run(isa: str, threads: None, dtype: torch.dtype) -> None:
    x, weight, targets = inputs(300, 64, 1500, dtype)

    def run() -> list[torch.Tensor]:
        out, gradients = step(linear_cross_entropy, x, weight, targets, OPTIONS[1])
        return [*out, *gradients]

    assert_same_for_threads(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    if isa == "simt":
        pytest.skip(
            "on a GPU the products are the library's, whose bits may change with their number of rows"
        )
    x, weight, targets = inputs(200, 50, 700, dtype)
    options = {"reduction": "none", "z_loss": 1e-3}

    def rows(pick: list[int]) -> list[torch.Tensor]:
        leaf = x[pick].requires_grad_()
        out = linear_cross_entropy(leaf, weight, targets[pick], **options)
        (dx,) = torch.autograd.grad((out.loss + out.z_loss).sum(), leaf)
        return [out.loss, out.z_loss, out.logprobs, out.lse, dx]

    whole = rows(list(range(200)))
    for pick in ([0], [7, 3], list(range(150, 199)), [199, *range(100)]):
        for a, b in zip(rows(pick), whole, strict=True):
            assert same_bits(a, b[pick])


def test_ignored_tokens_get_zeros_and_all_ignored_gives_nan() -> None:
    x, weight, targets = inputs(10, 8, 20, torch.float32)
    _, (dx, _) = step(linear_cross_entropy, x, weight, targets, {})
    assert (dx[1::5] == 0).all() and (dx[0] != 0).any()
    none = torch.full((10,), -100)
    out, gradients = step(linear_cross_entropy, x, weight, none, {"z_loss": 0.1})
    torch_loss = torch.nn.functional.cross_entropy(x @ weight.T, none)
    assert torch_loss.isnan() and out[0].isnan() and out[1].isnan()
    assert all((g == 0).all() for g in gradients)  # as torch's are
    assert linear_cross_entropy(x, weight, none, reduction="sum").loss == 0
    empty = linear_cross_entropy(x[:0], weight, targets[:0], reduction="none")
    assert empty.loss.shape == (0,)


def test_shapes_strides_and_alignment() -> None:
    base, targets = torch.randn(6 * 9 * 40 + 1), torch.randint(0, 50, (6, 9))
    x = base[1:].view(6, 9, 40)[:, :, :33]
    weight = torch.randn(51 * 40 + 3)[3:].view(51, 40)[:50, 2:35]
    got = linear_cross_entropy(x, weight, targets, reduction="none")
    dense = linear_cross_entropy(x.contiguous(), weight.contiguous(), targets, reduction="none")
    assert got.loss.shape == got.logprobs.shape == (6, 9)
    assert all(same_bits(a, b) for a, b in zip(got, dense, strict=True))
    turned = torch.randn(33, 50).t()
    out = linear_cross_entropy(x, turned, targets)
    assert same_bits(out.loss, linear_cross_entropy(x, turned.contiguous(), targets).loss)


def test_main_grad_takes_the_unrounded_gradient() -> None:
    x, weight, targets = inputs(40, 32, 90, torch.bfloat16)
    weight.requires_grad_()
    weight.main_grad = torch.ones(90, 32)
    leaf = x.clone().requires_grad_()
    linear_cross_entropy(leaf, weight, targets).loss.backward()
    assert weight.grad is None and leaf.grad is not None
    plain = weight.detach().clone().requires_grad_()
    linear_cross_entropy(x, plain, targets).loss.backward()
    assert same_bits((weight.main_grad - 1).bfloat16(), plain.grad) or torch.allclose(
        weight.main_grad - 1, plain.grad.float(), rtol=2**-8, atol=2**-23
    )  # adding to 1 costs half a step of f32 at 1
    exact = linear_cross_entropy_backward(
        torch.ones(()), None, x, weight.detach(), targets,
        linear_cross_entropy(x, weight.detach(), targets).lse, main_grad=(again := torch.ones(90, 32)),
    )  # fmt: skip
    assert exact[1] is None and same_bits(again, weight.main_grad)


def test_weight_gradient_sums_in_f32() -> None:
    # 4096 equal tokens add 4096 equal terms to each entry: a bf16 running sum would stop at 256 of them.
    x, weight = torch.ones(4096, 2).bfloat16(), torch.zeros(2, 2).bfloat16()
    weight.requires_grad_()
    linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64), reduction="sum").loss.backward()
    assert torch.equal(weight.grad, torch.tensor([[-2048.0, -2048.0], [2048.0, 2048.0]]).bfloat16())


def test_token_logprobs_and_their_gradient() -> None:
    x, weight, targets = inputs(12, 16, 30, torch.float32)
    x.requires_grad_()
    got = token_logprobs(x, weight, targets)
    expected = torch.log_softmax(x @ weight.T, -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    expected = expected * (targets >= 0)
    torch.testing.assert_close(got, expected)
    a, b = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (got, expected))
    torch.testing.assert_close(a, b)


def test_numpy_arrays_and_explicit_backward() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, weight, targets = inputs(9, 20, 40, torch.float32)
    out, gradients = step(linear_cross_entropy, x, weight, targets, OPTIONS[2])
    got = linear_cross_entropy(x.numpy(), weight.numpy(), targets.numpy(), **OPTIONS[2])
    assert isinstance(got.lse, np.ndarray)
    assert all(same_bits(torch.from_numpy(np.asarray(a)), b) for a, b in zip(got, out, strict=True))
    generator = torch.Generator().manual_seed(1)
    grads = [(torch.rand((), generator=generator) + 0.5).numpy() for _ in range(2)]
    backward = linear_cross_entropy_backward(
        *(np.asarray(g) for g in grads), x.numpy(), weight.numpy(), targets.numpy(), got.lse, **OPTIONS[2]
    )
    assert all(same_bits(torch.from_numpy(a), b) for a, b in zip(backward, gradients, strict=True))
    half = linear_cross_entropy(
        x.numpy().astype(ml_dtypes.bfloat16), weight.numpy().astype(ml_dtypes.bfloat16), targets.numpy()
    )
    assert (
        np.asarray(half.loss) == linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets).loss.numpy()
    )


def test_opcheck_gradcheck_and_second_derivative() -> None:
    x, weight, targets = inputs(4, 6, 9, torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    torch.library.opcheck(
        torch.ops.gptcore.linear_cross_entropy.default, (*leaves, targets, -100, 0.1, 0.01, 1.0, "mean")
    )
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    torch.autograd.gradcheck(
        lambda a, b: linear_cross_entropy_reference(a, b, targets, label_smoothing=0.1, z_loss=0.1)[:2],
        doubles,
    )
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiles_into_one_graph() -> None:
    x, weight, targets = inputs(9, 16, 33, torch.float32)

    def loss(a, b):
        out = linear_cross_entropy(a * 2, b, targets, z_loss=1e-3)
        return out.loss + out.z_loss

    eager = [t.clone().requires_grad_() for t in (x, weight)]
    compiled = [t.clone().requires_grad_() for t in (x, weight)]
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True)(*compiled).backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(eager, compiled, strict=True))


def test_autocast_takes_bf16_products_and_keeps_an_f32_loss() -> None:
    x, weight, targets = inputs(9, 16, 33, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_cross_entropy(x, weight, targets)
    assert same_bits(out.loss, linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets).loss)


# Of these rows the eager f32 forward makes the gradients of 512 and then of the rest.
MANY = (600, 33, 700)


def _unit_step(options: dict):
    """x, weight, targets and the result of MANY, ready for a backward with gradients of 1."""
    torch.manual_seed(3)
    x, weight, targets = inputs(*MANY, torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    return x, weight, targets, linear_cross_entropy(x, weight, targets, **options)


@pytest.mark.parametrize("options", OPTIONS[:3])
@pytest.mark.parametrize("shape", [MANY, (300, 100, 700), (40, 64, 300), (7, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_made_in_the_forward_are_the_backwards_bits(isa: str, dtype, shape, options: dict) -> None:
    x, weight, targets = inputs(*shape, dtype)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = linear_cross_entropy(*leaves, targets, **options)
    dx, dweight = torch.autograd.grad(out.loss + out.z_loss, leaves)
    plain = linear_cross_entropy(x, weight, targets, **options)
    assert all(same_bits(a.detach(), b) for a, b in zip(out, plain, strict=True))
    ones = torch.ones(()), torch.ones(())
    again = linear_cross_entropy_backward(*ones, x, weight, targets, out.lse, **options)
    assert same_bits(dx, again[0]) and same_bits(dweight, again[1])


@pytest.mark.parametrize("options", OPTIONS)
def test_many_rows_match_float64(isa: str, options: dict) -> None:
    check(*inputs(*MANY, torch.float32), **options)


def test_many_rows_have_the_same_bits_for_every_thread_count(isa: str, threads: None) -> None:
    def run() -> list[torch.Tensor]:
        x, weight, _, out = _unit_step(OPTIONS[1])
        return [*(o.detach() for o in out), *torch.autograd.grad(out.loss + out.z_loss, [x, weight])]

    assert_same_for_threads(run)


def test_kept_gradients_are_scaled_and_serve_again() -> None:
    x, weight, _, out = _unit_step({})
    first = torch.autograd.grad(out.loss, [x, weight], retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # the caller's own
    scaled = torch.autograd.grad(0.3 * out.loss, [x, weight], retain_graph=True)
    last = torch.autograd.grad(out.loss, [x, weight])
    assert all(same_bits(a, b) for a, b in zip(last, kept, strict=True))
    factor = torch.tensor(0.3).item()
    assert all(same_bits(a, b * factor) for a, b in zip(scaled, kept, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.loss, [x, weight])


def test_kept_bf16_gradients_are_rounded_once() -> None:
    x, weight, targets = inputs(300, 100, 700, torch.bfloat16)
    for factor in (0.25, 0.3, -2.0, 0.0):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = linear_cross_entropy(*leaves, targets)
        got = torch.autograd.grad(factor * out.loss, leaves)
        grads = torch.tensor(factor), torch.tensor(0.0)
        expected = linear_cross_entropy_backward(*grads, x, weight, targets, out.lse)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bf16_gradients_at_once_are_of_one_chunk() -> None:
    x, weight, targets = inputs(513, 16, 40, torch.bfloat16)
    results = torch.empty(()), torch.empty(()), torch.empty(513), torch.empty(513)
    with pytest.raises(ValueError, match="'x': got 513 rows, expected at most 512 of bf16"):
        backend.extension().linear_cross_entropy_forward(
            x, weight, targets, -100, 0.0, 0.0, 1.0, "mean", *results, torch.empty_like(x), None
        )


def test_different_gradients_of_loss_and_z_are_made_anew() -> None:
    for factors in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        x, weight, targets, out = _unit_step({"z_loss": 1e-2})
        got = torch.autograd.grad(factors[0] * out.loss + factors[1] * out.z_loss, [x, weight])
        grads = [torch.tensor(f) for f in factors]
        expected = linear_cross_entropy_backward(
            *grads, x.detach(), weight.detach(), targets, out.lse, z_loss=1e-2
        )
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    x, weight, targets, out = _unit_step({"z_loss": 1e-2})
    alone = torch.autograd.grad(out.z_loss, [x, weight])
    assert all(g.abs().max() > 0 for g in alone)


def test_only_wanted_gradients_are_made() -> None:
    x, weight, targets, out = _unit_step({})
    dx, dweight = torch.autograd.grad(out.loss, [x, weight])
    leaf = x.detach().requires_grad_()
    only_x = torch.autograd.grad(linear_cross_entropy(leaf, weight.detach(), targets).loss, leaf)[0]
    leaf = weight.detach().requires_grad_()
    only_weight = torch.autograd.grad(linear_cross_entropy(x.detach(), leaf, targets).loss, leaf)[0]
    assert same_bits(only_x, dx) and same_bits(only_weight, dweight)


def test_main_grad_waits_for_the_backward() -> None:
    x, weight, targets, out = _unit_step({})
    dweight = torch.autograd.grad(out.loss, weight)[0]
    weight.main_grad = torch.ones_like(dweight)
    loss = linear_cross_entropy(x, weight, targets).loss
    assert (weight.main_grad == 1).all()
    (2 * loss).backward()
    assert weight.grad is None and same_bits(weight.main_grad, 1 + 2 * dweight)


def test_many_ignored_rows_in_chunks() -> None:
    x, weight, targets, _ = _unit_step({})
    for kept in (0, 1, 513):  # none, a part of a chunk, a chunk and one more
        some = torch.where(torch.arange(len(targets)) < kept, targets.clamp(min=0), -100)
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
        dx, dweight = torch.autograd.grad(linear_cross_entropy(*leaves, some).loss, leaves)
        assert (dx[kept:] == 0).all() and dx.isfinite().all() and dweight.isfinite().all()
        assert (dweight == 0).all() == (kept == 0)


def _scratch_of(call: Callable[[], object]) -> int:
    """Bytes of scratch that ``call`` makes two threads hold.

    Scratch belongs to threads and is kept, so only a new thread, with workers of its own, shows all of it.
    """
    held = []

    def measured() -> None:
        backend.set_num_threads(2)
        before = backend.extension().scratch_bytes()
        call()
        held.append(backend.extension().scratch_bytes() - before)
        backend.set_num_threads(0)

    thread = threading.Thread(target=measured)
    thread.start()
    thread.join()
    return held[0]


def test_kept_logits_are_those_of_512_tokens() -> None:
    # torch holds logits, their log-softmax and its gradient: of 2048 tokens ten times as much.
    rows, classes = 2048, 50257
    x, weight, targets = inputs(rows, 64, classes, torch.float32, ignored=False)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    held = _scratch_of(lambda: linear_cross_entropy(x, weight, targets))
    assert 512 * classes * 4 < held <= 3 * rows * classes * 4 / 10


def test_extra_memory_is_a_tenth_of_the_logits() -> None:
    # torch's path holds at least two matrices of logits, in bf16 103 MB each.
    rows, classes = 1024, 50257
    x, weight, targets = inputs(rows, 128, classes, torch.bfloat16, ignored=False)
    held = _scratch_of(lambda: step(linear_cross_entropy, x, weight, targets, {"z_loss": 1e-3}))
    assert 0 < held <= 2 * rows * classes * 2 / 10


X, W, T = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
BAD = [
    (lambda: linear_cross_entropy(X.double(), W, T), TypeError, "'x': got float64"),
    (lambda: linear_cross_entropy(X, torch.randn(5, 3), T), ValueError, "'weight'.*expected.*4"),
    (lambda: linear_cross_entropy(X, W, T[:2]), ValueError, "'targets'"),
    (lambda: linear_cross_entropy(X, W, T.float()), TypeError, "'targets': got float32"),
    (lambda: linear_cross_entropy(X, W, T + 1), ValueError, "'targets': got 5 at position 2.*0 to 4 or ignore_index"),
    (lambda: linear_cross_entropy(X, W, T - 1), ValueError, "'targets': got -1 at position 0"),
    (lambda: linear_cross_entropy(X, W[:0], T), ValueError, "0 classes, expected 1 to"),
    (lambda: linear_cross_entropy(X, W, T, label_smoothing=1.5), ValueError, "label_smoothing.*0 to 1"),
    (lambda: linear_cross_entropy(X, W, T, reduction="max"), ValueError, "'max', expected 'mean', 'sum' or 'none'"),
    (lambda: linear_cross_entropy(X, W, T, logit_scale=float("inf")), ValueError, "logit_scale.*finite"),
    (lambda: linear_cross_entropy(X[0], W, T[0]), ValueError, "'targets'|'x'"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD[:-1])
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_bad_target_leaves_outputs_untouched() -> None:
    outputs = [torch.full((), 7.0), torch.full((), 7.0), torch.full((3,), 7.0), torch.full((3,), 7.0)]
    with pytest.raises(ValueError, match="targets"):
        backend.extension().linear_cross_entropy_forward(X, W, T + 1, -100, 0.0, 0.0, 1.0, "mean", *outputs)
    assert all((o == 7).all() for o in outputs)
