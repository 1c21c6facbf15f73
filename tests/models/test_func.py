from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap

from gptcore import ops
from tests.models.cases import CASES, model_of, tokens_of


@pytest.mark.parametrize("name", ["gpt2", "glm", "llama3", "gemma", "alibi-gqa-banded"])
def test_torch_func_differentiates_a_model_as_autograd_does(name: str) -> None:
    torch.manual_seed(0)
    model = model_of(CASES[name])
    tokens, targets = tokens_of(CASES[name])
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, parameters, (tokens, targets)).loss

    got = grad(loss)({key: p.detach() for key, p in parameters.items()})
    loss(parameters).backward()
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        # The linear maps are torch's there, whose sums take another order.
        error = (got[key] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 2e-5, key


def test_gradients_for_each_sample() -> None:
    x, weight, bias = torch.randn(5, 3, 40), torch.randn(40), torch.randn(40)

    def loss(weight: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(sample, weight, bias).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(weight, x)
    for i in range(5):
        torch.testing.assert_close(got[i], grad(loss)(weight, x[i]))


def test_second_derivatives_are_refused_there_too() -> None:
    x = torch.randn(4, 40)

    def slope(x: torch.Tensor) -> torch.Tensor:
        return grad(lambda x: ops.rms_norm(x).square().sum())(x).sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(slope)(x)
