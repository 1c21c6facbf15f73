"""GPT with experts: against the oracle, losses apart and in total, capacity, counts, initialisation."""

from __future__ import annotations

import math

import pytest
import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.models import GPT, GPTConfig, MoESpec, accounting, presets
from gptcore.nn import MoE
from tests.models import oracle
from tests.models.cases import CASES, model_of, tokens_of
from tests.models.test_gpt import ListCache

BASE = CASES["llama"]


def config_of(**moe) -> GPTConfig:
    return BASE.merged({"moe": {"num_experts": 5, "hidden_size": 40, **moe}})


@pytest.mark.parametrize(
    "moe", [{}, {"top_k": 1, "every": 2}, {"top_k": 3, "shared_experts": 1, "offset": 0, "every": 3}], ids=str
)
def test_a_choice_of_experts_against_the_oracle(moe: dict):
    config = config_of(**moe)
    model = model_of(config)
    tokens, targets = tokens_of(config)
    out = model(tokens, targets)
    out.loss.backward()
    leaves = {name: w.detach().double().requires_grad_() for name, w in model.named_parameters()}
    loss, _ = oracle.losses(oracle.logits(config, leaves, tokens), targets, 0.0, 0.0)
    loss.backward()
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert len(out.routing) == len(config.expert_layers)
    for name, parameter in model.named_parameters():
        # f32 sums over at most a few hundred terms in three layers
        exact = leaves[name].grad
        assert (parameter.grad - exact).norm() <= 3e-6 * max(float(exact.norm()), 1e-3), name


def test_losses_are_apart_and_in_the_total():
    model = model_of(config_of(balance_weight=0.5, z_weight=0.25, every=2, offset=0))
    tokens, targets = tokens_of(model.config)
    out = model(tokens, targets, z_loss=1e-3)
    loss, z_loss, logprobs, *_ = out
    assert logprobs.shape == tokens.shape
    balance = sum(layer.balance_loss for layer in out.routing)
    z = sum(layer.z_loss for layer in out.routing)
    torch.testing.assert_close(out.balance_loss, 0.5 * balance)
    torch.testing.assert_close(out.router_z_loss, 0.25 * z)
    torch.testing.assert_close(out.total, loss + z_loss + out.balance_loss + out.router_z_loss)
    router = model.stack.blocks[2].mlp.router.weight
    (apart,) = torch.autograd.grad(out.balance_loss + out.router_z_loss, router, retain_graph=True)
    (alone,) = torch.autograd.grad(loss + z_loss, router, retain_graph=True)
    (total,) = torch.autograd.grad(out.total, router)
    assert apart.any()
    torch.testing.assert_close(total, apart + alone)
    each = model(tokens, targets, reduction="none")
    assert each.loss.shape == tokens.shape and each.balance_loss.shape == ()


def test_dense_models_are_what_they_were():
    model = model_of(BASE)
    tokens, targets = tokens_of(BASE)
    out = model(tokens, targets, z_loss=1e-3)
    assert (out.balance_loss, out.router_z_loss, out.routing) == (None, None, ())
    assert torch.equal(out.total, out.loss + out.z_loss)
    assert "moe" not in BASE.to_dict() and BASE.expert_layers == ()


def test_capacity_in_training_and_in_evaluation():
    model = model_of(config_of(capacity_factor=0.5, eval_capacity_factor=0.0))
    tokens, targets = tokens_of(model.config)
    rates = [float(layer.drop_rate) for layer in model(tokens, targets).routing]
    assert len(rates) == 3 and min(rates) > 0.4  # half a place for every two choices
    model.eval()
    assert [float(layer.drop_rate) for layer in model(tokens, targets).routing] == [0.0] * 3


def test_a_cache_drops_no_token():
    model = model_of(config_of(capacity_factor=0.5)).eval()
    tokens, _ = tokens_of(model.config, length=9)
    free = GPT(model.config.merged({"moe": {"capacity_factor": 0.0}}))
    free.load_state_dict(model.state_dict())
    cache = ListCache(3)
    with torch.no_grad():
        wanted = free(tokens)
        first = model(tokens[:, :4], cache=cache, all_logits=True)
        rest = [model(tokens[:, t : t + 1], cache=cache)[:, None] for t in range(4, 9)]
        assert (model(tokens) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(torch.cat([first, *rest], 1), wanted, rtol=1e-5, atol=1e-5)


def test_which_blocks_have_experts():
    def layers(**moe) -> tuple[int, ...]:
        return GPTConfig(moe=MoESpec(**moe)).expert_layers

    assert layers() == tuple(range(12))
    assert layers(every=4) == (3, 7, 11)
    assert layers(every=4, offset=1) == (1, 5, 9)
    model = GPT(config_of(every=2))
    assert [isinstance(block.mlp, MoE) for block in model.stack.blocks] == [False, True, False]


@pytest.mark.parametrize(
    "config",
    [
        config_of(), config_of(every=2, shared_experts=3, noise=True, top_k=1),
        CASES["gpt2"].merged({"moe": {"every": 3, "offset": 1}}),
        CASES["gpt2"].merged({"moe": {"shared_experts": 1}, "mlp": {"activation": "geglu"}}),
    ],
    ids=["swiglu", "shared", "biases", "geglu-biases"],
)  # fmt: skip
def test_counts_are_those_of_the_model(config: GPTConfig):
    model = GPT(config, device="meta")
    parameters = dict(model.named_parameters())
    assert model.num_parameters() == accounting.parameter_counts(config).total
    experts = sum(
        p.numel()
        for name, p in parameters.items()
        if ".mlp." in name and name.split(".mlp.")[1].split(".")[0] in ("up", "down")
        and config.has_experts(int(name.split(".")[2]))
    )  # fmt: skip
    idle = experts * (config.moe.num_experts - config.moe.top_k) // config.moe.num_experts
    assert model.num_parameters(active=True) == model.num_parameters() - idle
    attention = 12 * config.num_layers * config.width * 10
    assert model.flops_per_token(10) == 6 * model.num_parameters(active=True) + attention


def test_presets_say_what_the_papers_do():
    switch, st_moe = presets.get("switch-base").moe, presets.get("st-moe").moe
    assert (switch.top_k, switch.every, switch.jitter, switch.z_weight) == (1, 2, 0.01, 0.0)
    assert (st_moe.top_k, st_moe.capacity_factor, st_moe.eval_capacity_factor) == (2, 1.25, 2.0)
    assert (st_moe.balance_weight, st_moe.z_weight, st_moe.every, st_moe.second_choice) == (
        1e-2, 1e-3, 4, "st_moe",
    )  # fmt: skip
    # 269B in an encoder and a decoder, whose 27 layers also attend to the encoder's output
    decoder = accounting.parameter_counts(presets.get("st-moe-32b"))
    assert 2 * decoder.total + decoder.attention == pytest.approx(269e9, rel=0.002)
    assert accounting.active_parameters(presets.get("mixtral")) == 12_879_925_248  # "13B active"
    assert accounting.active_parameters(presets.get("quickstart-moe")) < 1.01 * accounting.active_parameters(
        presets.get("quickstart")
    )


def test_initialisation_of_router_and_experts():
    wide = {
        "num_layers": 2,
        "width": 256,
        "attention": {"num_heads": 4},
        "vocab_size": 64,
        "context_length": 8,
    }
    moe = {"num_experts": 8, "noise": True, "shared_experts": 1}
    model = GPT(presets.get("gpt2", {**wide, "moe": {**moe, "router_init_scale": 0.1}}))
    layer = model.stack.blocks[0].mlp

    def check(weight: torch.Tensor, std: float) -> None:  # five standard errors
        assert abs(float(weight.std()) - std) < 5 * std / math.sqrt(2 * weight.numel())

    check(layer.router.weight.detach(), math.sqrt(0.1 / 256))
    for e in range(8):
        check(layer.up.weight[e].detach(), 0.02)
        check(layer.down.weight[e].detach(), 0.01)  # 0.02 / sqrt(2 L)
    check(layer.shared.down.weight.detach(), 0.01)
    assert len({float(weight[0, 0].detach()) for weight in layer.up.weight}) == 8
    assert not layer.noise.weight.any() and not layer.up.bias.any() and not layer.down.bias.any()
    family = GPT(presets.get("gpt2", {**wide, "moe": moe})).stack.blocks[0].mlp
    check(family.router.weight.detach(), 0.02)
    xavier = GPT(presets.get("gpt2", {**wide, "moe": moe, "init": "deepnet"})).stack.blocks[0].mlp
    check(xavier.up.weight.detach(), math.sqrt(2 / 1280) * 16**-0.25)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"moe": {"experts": 4}}, "did you mean 'model.moe.num_experts'?"),
        ({"moe": 8}, "model.moe: expected a table of keys, got 8 (int)"),
        ({"moe": {"top_k": 9}}, "model.moe.top_k: expected 1 to 8, got 9"),
        ({"moe": {"num_experts": 0}}, "model.moe.num_experts: expected a value above 0"),
        ({"moe": {"num_experts": 2, "top_k": 3}}, "model.moe.top_k: expected 1 to 2, got 3"),
        ({"moe": {"capacity_minimum": 0}}, "model.moe.capacity_minimum: expected a value above 0"),
        ({"moe": {"balance": "shazeer"}}, "model.moe.balance: 'shazeer' needs model.moe.noise = true"),
        ({"moe": {"w_load": -0.1}}, "model.moe.w_load: expected 0 or more, got -0.1"),
        ({"moe": {"num_experts": 5000}}, "expected at most 4096, got 5000"),
        ({"moe": {"every": 2, "offset": 2}}, "model.moe.offset: expected 0 to 1, below every = 2, got 2"),
        ({"moe": {"every": 13}}, "no block of 12 has experts with every = 13, offset = 12"),
        ({"moe": {"capacity_factor": -1}}, "model.moe.capacity_factor: expected 0 or more, got -1.0"),
        ({"moe": {"jitter": 1.0}}, "model.moe.jitter: expected at least 0 and below 1"),
        ({"moe": {"top_k": 1, "second_choice": "gshard"}}, "'gshard' needs a top_k of 2 or more"),
        (
            {"moe": {"capacity_convention": "per_choice"}},
            "unknown model.moe.capacity_convention 'per_choice'",
        ),
    ],
)
def test_mistakes_get_one_sentence(values: dict, sentence: str):
    with pytest.raises(UserError) as caught:
        GPTConfig.from_dict(values)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_is_the_same_model(tmp_path):
    model = model_of(config_of(capacity_factor=1.0)).eval()
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    path = checkpoint.save(tmp_path, 0, tensors, {"model": model.config.to_dict()})
    tensors, state = checkpoint.load(path)
    back = GPT(GPTConfig.from_dict(state["model"])).eval()
    back.load_state_dict(checkpoint.model_tensors(tensors, state))
    tokens, _ = tokens_of(model.config)
    with torch.no_grad():
        assert torch.equal(back(tokens), model(tokens))
