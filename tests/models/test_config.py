"""Configurations: round trip, derived sizes, and one clear sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gptcore.errors import UserError
from gptcore.models import AttentionSpec, GPTConfig, MlpSpec, NormSpec, PositionSpec, ScalingSpec, presets

RICH = GPTConfig(
    num_layers=3,
    width=48,
    vocab_size=97,
    context_length=40,
    attention=AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=12, pattern=("dense", "banded"), window=5),
    norm=NormSpec(kind="rms_norm", eps=1e-6, placement="sandwich", zero_centred=True),
    mlp=MlpSpec(hidden_size=80, activation="geglu_tanh", bias=False),
    position=PositionSpec(
        kind="rotary", base=(1e4, 1e6), rotary_fraction=0.5, scaling=ScalingSpec(kind="linear", factor=4)
    ),
    logit_soft_cap=30.0,
    embedding_scale=48**0.5,
)


@pytest.mark.parametrize("config", [RICH, *(presets.get(name) for name in presets.names())])
def test_round_trip_through_plain_values(config: GPTConfig):
    plain = json.loads(json.dumps(config.to_dict()))
    assert GPTConfig.from_dict(plain) == config


def test_derived_sizes_follow_changes():
    config = presets.get("gpt2", {"width": 1536, "attention": {"num_heads": 16}})
    assert (config.head_dim, config.num_kv_heads, config.hidden_size) == (96, 16, 6144)
    assert presets.get("gpt2").head_dim == 64
    assert RICH.rotary_dim == 6
    assert [RICH.rotary_base(layer) for layer in range(3)] == [1e4, 1e6, 1e4]


def test_windows_per_layer():
    assert [RICH.window_size(layer) for layer in range(3)] == [(-1, -1), (4, 0), (-1, -1)]
    both_sides = RICH.merged({"attention": {"causal": False}})
    assert both_sides.window_size(1) == (4, 4)
    gpt3 = presets.get("gpt3-175b")
    assert gpt3.window_size(0) == (-1, -1)
    assert gpt3.window_size(95) == (255, 0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"widht": 64}, "unknown key 'model.widht'; did you mean 'model.width'?"),
        ({"attention": {"n_heads": 4}}, "did you mean 'model.attention.num_heads'?"),
        ({"position": {"scaling": {"factr": 2}}}, "did you mean 'model.position.scaling.factor'?"),
        ({"attention": 12}, "model.attention: expected a table of keys, got 12 (int)"),
        ({"width": "768"}, "model.width: expected an integer, got '768' (str)"),
        ({"width": True}, "model.width: expected an integer, got True (bool)"),
        ({"width": -8}, "model.width: expected a value above 0, got -8"),
        ({"logit_scale": float("nan")}, "model.logit_scale: expected a value above 0, got nan"),
        ({"width": 770}, "model.width: 770 is not a multiple of 12 heads"),
        ({"norm": {"kind": "layernorm"}}, "unknown model.norm.kind 'layernorm'; did you mean 'layer_norm'?"),
        ({"norm": {"kind": "rms_norm", "bias": True}}, "an rms_norm has no bias"),
        ({"norm": {"placement": "post", "parallel": "shared"}}, "needs placement 'pre', got 'post'"),
        ({"norm": {"alpha": 2.0}}, "belongs to placement 'deepnorm'"),
        ({"attention": {"num_kv_heads": 5}}, "5 key/value heads don't divide 12 query heads"),
        ({"attention": {"pattern": []}}, "got an empty list"),
        ({"attention": {"pattern": ["dense", "strided"]}}, "expected a list of 'dense', 'banded'"),
        ({"position": {"kind": "rotary", "rotary_dim": 66}}, "expected 2 to the head size 64, got 66"),
        ({"position": {"base": 0.5}}, "expected numbers above 1"),
        ({"position": {"scaling": {"factor": 0.5}}}, "expected at least 1, got 0.5"),
        ({"position": {"scaled": []}}, "expected true, false or a list of them, got an empty list"),
        ({"head_bias": True}, "belongs to a head of its own"),
        ({"dropout": 1.0}, "model.dropout: expected at least 0 and below 1"),
        ({"embedding_grad_shrink": 0.0}, "expected above 0, at most 1"),
        ({"init": "gtp2"}, "did you mean 'gpt2'?"),
    ],
)
def test_mistakes_get_one_sentence(values: dict, sentence: str):
    with pytest.raises(UserError) as caught:
        GPTConfig.from_dict(values)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_construction_checks_types_too():
    with pytest.raises(UserError, match=r"model\.mlp\.bias: expected true or false, got 1 \(int\)"):
        MlpSpec(bias=1)  # type: ignore[arg-type]
    assert PositionSpec(base=[10000, 500000]).base == (1e4, 5e5)  # type: ignore[arg-type]


def test_configurations_need_no_torch():
    code = "import sys; from gptcore.models import GPTConfig, presets, accounting; presets.get('gpt2');"
    code += "accounting.parameter_counts(GPTConfig()); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
