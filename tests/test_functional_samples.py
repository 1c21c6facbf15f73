"""torch's own sample inputs for the functions of gptcore.functional: values, gradients, and the errors of bad input.

torch keeps them in an internal module for its own tests; where a version lacks it, these skip.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gptcore.functional as F

try:
    from torch.testing._internal.common_methods_invocations import op_db
except ImportError:  # the module itself, or what it imports
    pytest.skip(
        "this torch has no torch.testing._internal.common_methods_invocations", allow_module_level=True
    )

OPS = {
    op.name.removeprefix("nn.functional."): op
    for op in op_db
    if op.name.startswith("nn.functional.")
    and not op.variant_test_name
    and op.name.removeprefix("nn.functional.") in F.__all__
}
DTYPES = [torch.float32, torch.bfloat16]


def call(module: Any, name: str) -> Any:
    """The function in the order of the samples' arguments: torch lists embedding's weight before its indices."""
    function = getattr(module, name)
    if name != "embedding":
        return function
    return lambda weight, indices, **options: function(indices, weight, **options)


def differentiable(sample: Any) -> list[torch.Tensor]:
    values = [sample.input, *sample.args, *sample.kwargs.values()]
    return [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]


def results(function: Any, sample: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """The function's value for the sample, then the gradients of a fixed weighting of it."""
    sample = sample.transform(
        lambda x: x.detach().to(dtype).requires_grad_(x.requires_grad) if is_float(x) else x
    )
    torch.manual_seed(0)
    out = function(sample.input, *sample.args, **sample.kwargs)
    leaves = differentiable(sample)
    if not out.requires_grad:
        return [out]
    weights = (
        torch.linspace(-1, 1, max(out.numel(), 1)).view(out.shape).to(out.dtype)
        if out.numel()
        else out.detach()
    )
    grads = torch.autograd.grad(out, leaves, weights, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


def attention_allowance(sample: Any, dtype: torch.dtype, size: float) -> float:
    """What a fused attention may err where torch, for three dimensions, computes every step by itself.

    A score's rounding is an error of its exponential, relative to 1; and backward takes sum(dout * out) of the
    rounded out (Dao 2023, "FlashAttention-2", algorithm 2), which multiplies keys and queries.
    """
    q, k, v = (x.detach().double() for x in (sample.input, *sample.args))
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2)).abs().max() * scale
    rounded = (
        torch.finfo(dtype).eps / 2 * q.shape[-1] * v.abs().max() * scale * max(q.abs().max(), k.abs().max())
    )
    return float(torch.finfo(torch.float32).eps * scores * size + rounded)


def is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def test_every_function_has_samples():
    assert OPS.keys() == set(F.__all__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(OPS))
def test_values_and_gradients(name: str, dtype: torch.dtype):
    theirs, ours = call(torch.nn.functional, name), call(F, name)
    eps = torch.finfo(dtype).eps
    count = 0
    for sample in OPS[name].sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs.get("dropout_p", 0.0) > 0.0:
            continue  # torch's generator draws another mask
        exact = results(theirs, sample, torch.float64)
        reference, got = results(theirs, sample, dtype), results(ours, sample, dtype)
        assert len(got) == len(reference)
        for want, ref, x in zip(exact, reference, got, strict=True):
            assert x.dtype == ref.dtype and x.shape == ref.shape
            assert torch.equal(x.isnan(), ref.isnan())
            if not x.numel():
                continue
            scale = want.abs().nan_to_num(0, 0, 0).max()
            error, bound = (x.double() - want).abs(), (ref.double() - want).abs().nan_to_num(0, 0, 0).max()
            if name == "scaled_dot_product_attention":
                bound = bound + attention_allowance(sample, dtype, scale)
            assert error.nan_to_num(0, 0, 0).max() <= 2 * bound + 4 * eps * scale, sample
        count += 1
    assert count


@pytest.mark.parametrize("name", sorted(name for name, op in OPS.items() if op.error_inputs_func is not None))
def test_errors_are_torchs(name: str):
    op = OPS[name]
    for case in op.error_inputs("cpu"):
        sample = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            call(F, name)(sample.input, *sample.args, **sample.kwargs)
