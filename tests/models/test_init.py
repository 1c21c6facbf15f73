"""Initialisation against the deviations that the papers give."""

from __future__ import annotations

import math

import pytest
import torch

from gptcore.models import GPT, GPTConfig, NormSpec, presets

WIDE = {"num_layers": 2, "width": 128, "vocab_size": 512, "context_length": 64, "attention": {"num_heads": 4}}


def _model(init: str, **changes) -> GPT:
    return GPT(presets.get("gpt2", {**WIDE, "init": init, **changes}), seed=7)


def _check(weight: torch.Tensor, std: float) -> None:
    """Mean and deviation of n draws are within 5 standard errors: 5 std/sqrt(n), 5 std/sqrt(2n)."""
    n, weight = weight.numel(), weight.detach()
    assert abs(float(weight.mean())) < 5 * std / math.sqrt(n)
    assert abs(float(weight.std()) - std) < 5 * std / math.sqrt(2 * n)


@pytest.mark.parametrize(
    ("init", "std", "out", "table"),
    [
        ("gpt1", 0.02, 0.02, 0.02),
        ("gpt2", 0.02, 0.01, 0.02),
        ("opt", 0.006, 0.003, 0.006),
        ("bloom", 384**-0.5, 384**-0.5 / 2, 384**-0.5),
        ("llama", 0.02, 0.01, 0.02),
        ("palm", 128**-0.5, 128**-0.5, 1.0),
    ],
)
def test_normal_families(init: str, std: float, out: float, table: float):
    model = _model(init)
    block = model.stack.blocks[1]
    _check(block.attention.qkv.weight, std)
    _check(block.mlp.up.weight, std)
    _check(block.attention.out.weight, out)
    _check(block.mlp.down.weight, 512**-0.5 if init == "palm" else out)
    _check(model.token_embedding.weight, table)
    _check(model.position_embedding.weight, table)
    assert not block.attention.qkv.bias.any()
    assert torch.equal(block.norm1.weight, torch.ones(128))


@pytest.mark.parametrize(("init", "gain"), [("glm", 4**-0.5), ("deepnet", 16**-0.25)])
def test_xavier_families_scale_all_but_query_and_key(init: str, gain: float):
    model = GPT(
        presets.get(
            "gpt2", {**WIDE, "init": init, "mlp": {"activation": "geglu"}, "norm": {"placement": "deepnorm"}}
        )
    )
    block = model.stack.blocks[0]
    q, k, v = block.attention.qkv.weight.split(128)
    square, wide = math.sqrt(2 / 256), math.sqrt(2 / 640)
    _check(q, square)
    _check(k, square)
    _check(v, square * gain)
    _check(block.attention.out.weight, square * gain)
    for rows in block.mlp.up.weight.split(512):
        _check(rows, wide * gain)
    _check(block.mlp.down.weight, wide * gain)


def test_own_deviation_and_zero_centred_gains():
    model = GPT(GPTConfig(**{"num_layers": 1, "width": 96, "vocab_size": 200, "init_std": 0.3}, norm=NormSpec(
        kind="rms_norm", zero_centred=True)))  # fmt: skip
    _check(model.token_embedding.weight, 0.3)
    assert not model.stack.final_norm.weight.any()


def test_a_seed_is_the_same_model_in_every_dtype_and_thread_count():
    before = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    first = _model("gpt2").state_dict()
    try:
        torch.set_num_threads(1)
        alone = _model("gpt2").state_dict()
    finally:
        torch.set_num_threads(threads)
    half = GPT(presets.get("gpt2", WIDE), seed=7, dtype=torch.bfloat16).state_dict()
    other = GPT(presets.get("gpt2", WIDE), seed=8).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, alone[name])
        assert torch.equal(weight.bfloat16(), half[name])
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])
    assert torch.equal(before, torch.random.get_rng_state())  # torch's own generator is left alone
