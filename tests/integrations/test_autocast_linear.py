"""Linear layers in training under autocast: torch's results and gradients, without its copies of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gptcore
from gptcore.integrations import autocast_linear

ROWS, INPUTS, OUTPUTS = 130, 40, 56


def conv1d() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.pytorch_utils.Conv1D(OUTPUTS, INPUTS)


LAYERS = {
    "linear": lambda: nn.Linear(INPUTS, OUTPUTS), "without bias": lambda: nn.Linear(INPUTS, OUTPUTS, bias=False),
    "conv1d": conv1d,
}  # fmt: skip


def step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of input and parameters."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(leaf)
    inputs = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("library", [False, True], ids=["our products", "the library's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_further_from_float64_than_torch(
    name: str, dtype: torch.dtype, library: bool, monkeypatch: pytest.MonkeyPatch
):
    if library:
        monkeypatch.setattr(autocast_linear, "amx", lambda: False)
    layer, x = LAYERS[name](), torch.randn(2, ROWS // 2, INPUTS).to(dtype)
    grad = torch.randn(2, ROWS // 2, OUTPUTS).to(torch.bfloat16)
    theirs = step(layer, x, grad)
    gptcore.replace(layer, verbose=False)
    ours = step(layer, x, grad)
    rounded, gradient = x.to(torch.bfloat16).double(), grad.double()
    weight = next(layer.parameters()).detach().to(torch.bfloat16).double()
    by_output = gradient.flatten(0, 1).mT @ rounded.flatten(0, 1)
    straight = weight.mT if name == "conv1d" else weight
    exact = [rounded @ straight.mT, gradient @ straight, by_output.mT if name == "conv1d" else by_output]
    if name != "without bias":
        exact[0] = exact[0] + list(layer.parameters())[1].detach().double()
        exact.append(gradient.sum((0, 1)))
    for got, like, wanted in zip(ours, theirs, exact, strict=True):
        assert got.dtype == like.dtype and got.shape == like.shape
        assert (got - wanted).abs().max() <= (like - wanted).abs().max() + 1e-6 * wanted.abs().max()


def kept_by(module: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes of what a call keeps until backward, but for parameters."""
    kept: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        module(x)
    shared = [parameter.data_ptr() for parameter in module.parameters()]
    return [tuple(t.shape) for t in kept if t.data_ptr() not in shared]


def test_nothing_is_kept_but_the_input():
    layer = nn.Linear(INPUTS, OUTPUTS)
    gptcore.replace(layer, verbose=False)
    assert kept_by(layer, torch.randn(ROWS, INPUTS)) == [(ROWS, INPUTS)]


def test_frozen_weights_and_small_or_exact_calls_go_their_way():
    layer, x = nn.Linear(INPUTS, OUTPUTS), torch.randn(ROWS, INPUTS, requires_grad=True)
    gptcore.replace(layer, verbose=False)
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        few = layer(x[:3])
    assert type(y.grad_fn.next_functions[0][0]).__name__.startswith("_AutocastLinear")
    assert "AutocastLinear" not in type(few.grad_fn).__name__
    y.float().sum().backward()
    assert layer.weight.grad is None and x.grad is not None and layer.bias.grad is not None
    assert layer(x).dtype == torch.float32


def test_gpt2s_feed_forward_keeps_no_activation_unless_somebody_watches():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_embd=INPUTS, resid_pdrop=0.0)
    mlp = transformers.models.gpt2.modeling_gpt2.GPT2MLP(OUTPUTS, config)
    x, grad = torch.randn(ROWS, INPUTS), torch.randn(ROWS, INPUTS).to(torch.bfloat16)
    theirs = step(mlp, x, grad)
    gptcore.replace(mlp, verbose=False)
    ours, seen = step(mlp, x, grad), []
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == wanted.dtype
        assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()
    assert kept_by(mlp, x) == [(ROWS, INPUTS), (ROWS, OUTPUTS)]
    mlp.act.register_forward_hook(lambda *_: seen.append("act"))
    again = step(mlp, x, grad)
    assert seen == ["act"] and kept_by(mlp, x).count((ROWS, OUTPUTS)) == 2
    assert all((a - b).abs().max() <= 0.02 * b.abs().max() for a, b in zip(again, ours, strict=True))
