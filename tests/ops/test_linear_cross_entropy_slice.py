"""Slices of a vocabulary make up the loss of the whole, whose float64 reference is the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gptcore.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from gptcore.ops.linear_cross_entropy_slice import (
    linear_cross_entropy_slice,
    linear_cross_entropy_slice_backward,
)
from tests.ops.linear_cross_entropy_cases import DTYPES, inputs
from tests.tolerance import assert_close_to_exact, same_bits

CUTS = {"even": [0, 100, 200, 300], "uneven": [0, 1, 180, 300], "whole": [0, 300]}
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2, "z_loss": 0.01},
    "capped": {"logit_soft_cap": 3.0, "logit_scale": 1.5, "label_smoothing": 1.0},
    "biased": {"bias": True, "z_loss": 0.1, "logit_scale": 0.5},
}


def reference(tensors, options):
    """Losses, z-losses, logprobs, lse and gradients of x, weight and bias in the tensors' dtype."""
    x, weight, bias = (None if t is None else t.clone().requires_grad_() for t in (*tensors[:2], tensors[3]))
    out = linear_cross_entropy_reference(x, weight, tensors[2], **{**options, "bias": bias}, reduction="none")
    (out.loss * tensors[4] + out.z_loss * tensors[5]).sum().backward()
    return [t.detach() for t in out], [t.grad for t in (x, weight, bias) if t is not None]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_make_up_the_whole(isa: str, dtype: torch.dtype, name: str, cut: str) -> None:
    torch.manual_seed(3)
    options = dict(OPTIONS[name])
    x, weight, targets = inputs(37, 40, 300, dtype)
    bias = torch.randn(300).to(dtype) if options.pop("bias", False) else None
    grads = [torch.randn(37), torch.randn(37)]
    z_loss = options.pop("z_loss", 0.0)
    parts, bounds = [], CUTS[cut]
    slices = [(start, slice(start, stop)) for start, stop in itertools.pairwise(bounds)]
    for start, own in slices:
        more = {**options, "bias": None if bias is None else bias[own]}
        parts.append(linear_cross_entropy_slice(x, weight[own], targets, start, 300, **more))
    kept = targets != -100
    lse = torch.where(kept, torch.stack([part.lse for part in parts]).double().logsumexp(0), 0).float()
    loss = sum(part.loss for part in parts) + lse
    logprobs = sum(part.target_logit for part in parts) - lse

    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact, exact_gradients = reference(
        (*wide[:2], targets, wide[2], *(g.double() for g in grads)), {**options, "z_loss": z_loss}
    )
    twin, twin_gradients = reference((x, weight, targets, bias, *grads), {**options, "z_loss": z_loss})
    for got, e, t in zip((loss, z_loss * lse * lse, logprobs, lse), exact, twin, strict=True):
        assert_close_to_exact(got, e, t, terms=40, summand=float(exact[3].abs().max()))

    gradients = []
    for start, own in slices:
        more = {**options, "bias": None if bias is None else bias[own], "z_loss": z_loss}
        gradients.append(
            linear_cross_entropy_slice_backward(*grads, x, weight[own], targets, lse, start, 300, **more)
        )
    dx = sum(g[0].float() for g in gradients).to(dtype)
    got = [dx, torch.cat([g[1] for g in gradients])]
    if bias is not None:
        got.append(torch.cat([g[2] for g in gradients]))
    for g, e, t in zip(got, exact_gradients, twin_gradients, strict=True):
        # dx adds as many parts, each rounded, as there are slices
        assert_close_to_exact(g, e, t, terms=300 * len(slices))


def test_one_slice_of_all_has_the_bits_of_the_whole() -> None:
    x, weight, targets = inputs(20, 16, 90, torch.float32)
    whole = linear_cross_entropy(x, weight, targets, reduction="none")
    part = linear_cross_entropy_slice(x, weight, targets, 0, 90)
    assert same_bits(part.lse, whole.lse)
    assert same_bits(part.target_logit - part.lse, whole.logprobs)


def test_gradients_are_added_to_main_grad_and_left_out_where_not_wanted() -> None:
    x, weight, targets = inputs(20, 16, 90, torch.bfloat16)
    lse = linear_cross_entropy(x, weight, targets, reduction="none").lse
    call = (torch.ones(20), None, x, weight[30:60], targets, lse, 30, 90)
    dx, dweight, _ = linear_cross_entropy_slice_backward(*call)
    main_grad = torch.ones(30, 16)
    again, nothing, _ = linear_cross_entropy_slice_backward(*call, main_grad=main_grad)
    assert same_bits(again, dx) and nothing is None
    assert_close_to_exact(
        dweight.float(), (main_grad - 1).double(), torch.zeros(30, 16) + (main_grad - 1).bfloat16()
    )
    assert linear_cross_entropy_slice_backward(*call, wanted=(False, False, False)) == (None, None, None)


def test_numpy_arrays() -> None:
    x, weight, targets = inputs(20, 16, 90, torch.float32)
    wanted = linear_cross_entropy_slice(x, weight[30:60], targets, 30, 90)
    got = linear_cross_entropy_slice(x.numpy(), weight[30:60].numpy(), targets.numpy(), 30, 90)
    for a, b in zip(got, wanted, strict=True):
        assert isinstance(a, np.ndarray) and same_bits(torch.from_numpy(a), b)


@pytest.mark.parametrize(
    ("first", "classes", "sentence"),
    [
        (-1, 90, "argument 'first_class': got -1 with 30 classes from it on, expected a slice of 90"),
        (61, 90, "argument 'first_class': got 61 with 30 classes from it on, expected a slice of 90"),
        (0, 50, "argument 'targets': got .* expected a class of 0 to 49"),
    ],
)
def test_slices_that_do_not_fit(first: int, classes: int, sentence: str) -> None:
    x, weight, targets = inputs(200, 16, 90, torch.float32)
    with pytest.raises(ValueError, match=sentence):
        linear_cross_entropy_slice(x, weight[:30], targets, first, classes)
