"""Shapes, options and the comparison with float64 that the tests of linear_cross_entropy share."""

from __future__ import annotations

from typing import Any

import torch

from gptcore.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.tolerance import ROUNDOFF, assert_close_to_exact

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (1, 1, 1),
    (1, 3, 17),
    (3, 17, 33),
    (17, 33, 65),
    (33, 65, 3),
    (65, 40, 1),
    (40, 64, 300),
    (70, 33, 2100),
]
OPTIONS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_scale": 0.5},
    {"reduction": "sum", "z_loss": 1e-3},
    {"reduction": "none", "label_smoothing": 0.3, "z_loss": 1e-2},
]


def inputs(rows: int, width: int, classes: int, dtype: torch.dtype, *, ignored: bool = True):
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(classes, width).to(dtype)
    targets = torch.randint(0, classes, (rows,))
    if ignored:
        targets[1::5] = -100
    return x, weight, targets


def step(function, x, weight, targets, options):
    """All outputs, then the gradients of x, weight and a bias under random gradients of loss and z_loss."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    if "bias" in options:
        bias = options["bias"].detach()
        leaves.append((bias.double() if x.dtype == torch.float64 else bias.clone()).requires_grad_())
        options = {**options, "bias": leaves[-1]}
    out = function(*leaves[:2], targets, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.rand(out.loss.shape, generator=generator, device="cpu") + 0.5 for _ in range(2)]
    gradients = torch.autograd.grad([out.loss, out.z_loss], leaves, [g.to(out.loss) for g in grads])
    return [o.detach() for o in out if o is not None], list(gradients)


def largest_share(targets: torch.Tensor, lse: torch.Tensor, options: dict[str, Any]) -> float:
    """The most that a probability counts for in the gradient of its logit, for gradients of loss and z below 1.5."""
    kept = targets != options.get("ignore_index", -100)
    if not kept.any():
        return 0.0
    weights = options.get("token_weight", torch.ones(targets.shape))[kept].double()
    classes = options.get("class_weight", torch.ones(1 + int(targets.max()))).double()
    mean = options.get("reduction", "mean") == "mean"
    divisor = (weights * classes[targets[kept]]).sum().item() if mean else 1.0
    most = weights.abs().max().item() * max(classes.max().item(), 1.0) / divisor
    z = 1 + 2 * options.get("z_loss", 0.0) * lse.abs().max().item()
    return 1.5 * most * options.get("logit_scale", 1.0) * z


def check_predicted(x, weight, targets, predicted, options, error: float) -> None:
    """The predicted class has the largest logit, within the error of two logits."""
    plain = {k: v for k, v in options.items() if k in ("bias", "logit_scale", "logit_soft_cap")}
    best = linear_cross_entropy_reference(
        x.double(), weight.double(), targets, reduction="none", return_predicted=True, **plain
    ).predicted
    kept = targets >= 0
    assert torch.equal(predicted < 0, ~kept) and predicted.dtype == torch.int64
    for token, a, b in zip(x[kept].double(), predicted[kept], best[kept], strict=True):
        pair = linear_cross_entropy_reference(
            token.expand(2, -1), weight.double(), torch.stack([a, b]), reduction="none", **plain
        ).logprobs
        assert pair[1] - pair[0] <= 2 * error


def check(x, weight, targets, **options) -> None:
    """Outputs and gradients against float64, beside the reference in x's dtype."""
    got, got_gradients = step(linear_cross_entropy, x, weight, targets, options)
    exact, exact_gradients = step(
        linear_cross_entropy_reference, x.double(), weight.double(), targets, options
    )
    twin, twin_gradients = step(linear_cross_entropy_reference, x, weight, targets, options)
    width = x.shape[-1]
    # Logits are sums of C products: partial sums reach two deviations of their random walk, whose roundings remain
    # in differences of logits that cancel.
    logit = (
        2.0 * (x.double().square().sum(-1).max() * weight.double().square().max()).sqrt().item()
        if x.numel()
        else 0
    )
    if "bias" in options:
        logit += options["bias"].abs().max().item()
    # A loss is weighted, and where signs differ the sum is smaller than what is added up.
    tokens = (
        options.get("token_weight", torch.ones(1)).abs() * options.get("class_weight", torch.ones(1)).max()
    )
    reach = (tokens.sum() if options.get("reduction") == "sum" else tokens.max()).item()
    names = ["loss", "z_loss", "logprobs", "lse"]
    names += (
        ["entropy"] if options.get("return_entropy") else []
    )  # errs by a probability's error times its logarithm
    for i, name in enumerate(names):
        summand = logit * max(reach, 1.0) if i < 2 else logit
        assert_close_to_exact(got[i], exact[i], twin[i], terms=width, summand=summand, what=name)
    if options.get("return_predicted"):
        check_predicted(
            x, weight, targets, got[-1], options, 2 * ROUNDOFF[torch.float32] * logit * width**0.5
        )
    # Gradients add up to N (or V) products of a gradient of a logit (at most the largest factor of a row) with an
    # entry; a probability errs by its logit's error. bf16 products round each gradient of a logit once.
    share = largest_share(targets, got[3], options)
    relative = ROUNDOFF[torch.float32] * (1 + logit) * width**0.5
    both = x.dtype == weight.dtype == torch.bfloat16
    relative += 2 * torch.finfo(torch.bfloat16).eps / 2 if both else 0
    factors = [weight, x, torch.ones(1)]
    for name, a, b, c, factor in zip(
        ("dx", "dweight", "dbias"), got_gradients, exact_gradients, twin_gradients, factors, strict=False
    ):
        floor = 2 * relative * share * factor.abs().max().item() * (4 if both else 2)
        result = torch.finfo(a.dtype).eps * b.abs().max().item()
        error = (a.double() - b).abs().max().item()
        bound = 2 * (c.double() - b).abs().max().item() + floor + result
        assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e}"
