"""Upcycling: a dense model and the experts made of it compute the same, where the page says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore.errors import UserError
from gptcore.models import GPT, MoESpec, upcycle
from gptcore.models.upcycling import copy_weights
from tests.models.cases import CASES, model_of, tokens_of


def outputs(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_of(model.config)[0])


@pytest.mark.parametrize("case", ["llama", "gpt2", "gptj", "glm"])
@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 4}, {"num_experts": 3, "top_k": 3, "every": 2}, {"top_k": 1, "renormalise": True},
        {"num_experts": 5, "shared_experts": 2, "noise": True, "jitter": 0.1},
        {"num_experts": 4, "capacity_factor": 0.5, "eval_capacity_factor": 4.0},
    ],
    ids=str,
)  # fmt: skip
def test_outputs_are_those_of_the_dense_model(case: str, moe: dict[str, Any]):
    model = model_of(CASES[case]).eval()
    grown = upcycle(model, MoESpec(**moe), seed=3)
    assert not grown.training and grown.config.moe == MoESpec(**moe)
    wanted, got = outputs(model), outputs(grown)
    # a weighted mean of equal terms rounds in the last place, and three layers carry that on
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_outputs_in_bf16_are_the_same_but_for_its_rounding():
    model = model_of(CASES["llama"], torch.bfloat16).eval()
    grown = upcycle(model, MoESpec(num_experts=4))
    assert {p.dtype for p in grown.parameters()} == {torch.bfloat16}
    wanted = outputs(model)
    assert (outputs(grown) - wanted).abs().max() <= 4 * 2.0**-8 * wanted.abs().max()


def test_every_expert_is_a_copy_and_routers_differ_by_seed():
    model = model_of(CASES["gpt2"]).train()
    grown, other = (
        upcycle(model, MoESpec(num_experts=3, every=2)),
        upcycle(model, MoESpec(num_experts=3), seed=1),
    )
    assert grown.training
    dense, experts = model.stack.blocks[1].mlp, grown.stack.blocks[1].mlp
    for e in range(3):
        assert torch.equal(experts.up.weight[e], dense.up.weight)
        assert torch.equal(experts.down.bias[e], dense.down.bias)
    assert torch.equal(grown.stack.blocks[0].mlp.up.weight, model.stack.blocks[0].mlp.up.weight)
    assert torch.equal(grown.token_embedding.weight, model.token_embedding.weight)
    assert not torch.equal(experts.router.weight, other.stack.blocks[1].mlp.router.weight)
    with torch.no_grad():
        experts.up.weight[0].zero_()
    assert dense.up.weight.any() and experts.up.weight[1].any()  # memory of its own


def test_without_renormalising_the_feed_forward_is_scaled_by_what_is_chosen():
    model = model_of(CASES["gpt2"].merged({"num_layers": 1})).eval()
    grown = upcycle(model, MoESpec(num_experts=4, top_k=1))
    x = torch.randn(7, 48)
    gate = (x @ grown.stack.blocks[0].mlp.router.weight.T).softmax(-1).amax(-1, keepdim=True)
    with torch.no_grad():
        wanted = gate * model.stack.blocks[0].mlp(x)
        torch.testing.assert_close(grown.stack.blocks[0].mlp(x).output, wanted, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    model = model_of(CASES["gpt2"])
    experts = upcycle(model, MoESpec(num_experts=2))
    with pytest.raises(UserError, match="has experts already"):
        upcycle(experts, MoESpec(num_experts=2))
    with pytest.raises(
        UserError, match=r"'stack.blocks.0.mlp.up.weight' has shape \(192, 48\) where the new model has"
    ):
        upcycle(model, MoESpec(num_experts=2, hidden_size=96))
    with pytest.raises(
        UserError, match="differ in more than experts: only one has 'position_embedding.weight'"
    ):
        copy_weights(model, GPT(CASES["gpt2"].merged({"position": {"kind": "none"}})))
    with pytest.raises(UserError, match=r"only one has 'stack.blocks.0.mlp.router.weight'|has shape"):
        copy_weights(experts, GPT(CASES["gpt2"]))
