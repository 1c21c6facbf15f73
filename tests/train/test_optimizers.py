"""Every optimizer a config can name: built as asked, resumed bit for bit, unfitting settings refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.optim import SGD, Adafactor, Adam, AdamW, AdamW8bit
from gptcore.train import from_table, held_out, run
from gptcore.train.optimizers import OptimizerSpec, build

from .toy import Toy, ToyLoader, settings, train

# Settings that learn the toy's counting, and a piece of state that must be there.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "adamw": ({"lr": 0.01, "amsgrad": True}, "max_exp_avg_sq"),
    "adam": ({"name": "adam", "lr": 0.01, "weight_decay": 1e-4}, "exp_avg_sq"),
    "sgd": ({"name": "sgd", "lr": 0.3, "nesterov": True}, "momentum_buffer"),
    "adafactor": ({"name": "adafactor", "lr": 0.02}, "row_var"),
    "adafactor paper": ({"name": "adafactor", "variant": "paper", "lr": 0.02}, "col_var"),
    "adafactor hf": (
        {"name": "adafactor", "variant": "hf", "lr": 0.03, "beta1": 0.5, "clip_threshold": 2.0},
        "exp_avg",
    ),
    "adafactor palm": ({"name": "adafactor", "variant": "palm", "lr": 0.1}, "variance"),
    "adamw_8bit": ({"name": "adamw_8bit", "lr": 0.01}, "exp_avg_scale"),
    "adamw_8bit without masters": (
        {"name": "adamw_8bit", "lr": 0.01, "master_weights": False},
        "exp_avg_sq_scale",
    ),
}
# Its matrices have 4,096 elements or more, from where 8-bit moments begin.
WIDTH = 128


def spec(**table: Any) -> OptimizerSpec:
    return OptimizerSpec.from_dict(table)


def wide(table: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """Trains the toy at ``WIDTH``."""
    model = Toy(width=WIDTH)
    evaluate = held_out(ToyLoader(seed=1), 3)
    options = {"evaluate": evaluate, "measure_peak": False, "quiet": True}
    return model, run(from_table(table), model=model, loader=ToyLoader(), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_learns_and_resumes_bit_for_bit(tmp_path: Path, kind: str, dtype: str) -> None:
    optimizer, piece = KINDS[kind]
    table = {"optimizer": optimizer, "dtype": dtype, "schedule": {"name": "constant"}, "steps": 24}
    _, result = wide(settings(tmp_path / "straight", **table))
    assert result.evaluation["val_loss"] < 3.0, "ln 32 = 3.47 is guessing"
    wide(settings(tmp_path / "parts", **{**table, "steps": 11}))
    wide(settings(tmp_path / "parts", **table))
    want, got = (checkpoint.load(tmp_path / name / "checkpoints")[0] for name in ("straight", "parts"))
    assert any(name.endswith(f"/{piece}") for name in want), sorted(want)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_random_rounding_follows_the_seed_of_the_run(tmp_path: Path) -> None:
    """Without masters the same run under another seed rounds otherwise; dropout is off."""
    weights = []
    for run_seed in (1, 1, 2):
        model = Toy(width=WIDTH, dropout=0.0)
        config = from_table(
            settings(
                tmp_path / str(len(weights)),
                steps=3,
                seed=run_seed,
                dtype="bfloat16",
                optimizer=KINDS["adamw_8bit without masters"][0],
            )
        )
        run(config, model=model, loader=ToyLoader(), measure_peak=False, quiet=True)
        weights.append(model.up.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_what_is_built() -> None:
    """Class and settings, in the group that decays and in the one that does not."""
    model = Toy()
    cases = [
        (spec(), AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}),
        (spec(name="adam", eps=1e-6), Adam, {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0}),
        (
            spec(name="sgd", momentum=0.8, dampening=0.1, weight_decay=0.01),
            SGD,
            {"momentum": 0.8, "dampening": 0.1, "nesterov": False, "weight_decay": 0.01},
        ),
        (spec(name="adafactor", eps=[1e-10, 1e-3]), Adafactor, {"eps": (1e-10, 1e-3), "d": 1.0}),
        (
            spec(name="adafactor", variant="hf", beta2_decay=-0.7, scale_parameter=False),
            Adafactor,
            {"decay_rate": -0.7, "scale_parameter": False, "relative_step": False, "lr": 1e-3},
        ),
        (spec(name="adafactor", variant="palm"), Adafactor, {"weight_decay": 1.0, "beta1": 0.9}),
        (spec(name="adamw_8bit"), AdamW8bit, {"weight_decay": 0.1, "master_weights": True, "seed": 5}),
    ]
    for table, kind, expected in cases:
        optimizer = build(table, model, seed=5)
        assert type(optimizer) is kind and optimizer.max_norm == 1.0
        assert {name: optimizer.param_groups[0][name] for name in expected} == expected
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == [expected.get("weight_decay", 0.0), 0.0]
    assert build(spec(max_norm=0.0), model).max_norm is None
    assert build(spec(split_master=True), model).split_master  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"name": "adafacto"}, "unknown optimizer.name 'adafacto'; did you mean 'adafactor'"),
        ({"name": "sgd", "betas": [0.9, 0.9]}, "optimizer.betas: sgd does not have it (adamw, adam, adamw_8bit)"),
        ({"momentum": 0.9}, "optimizer.momentum: adamw does not have it (sgd)"),
        ({"name": "adamw_8bit", "split_master": False}, "optimizer.split_master: adamw_8bit does not"),
        ({"variant": "hf"}, "optimizer.variant: adamw does not have it"),
        ({"name": "adafactor", "beta1": 0.9}, "optimizer.beta1: adafactor torch does not have it (adafactor hf, adaf"),
        ({"name": "adafactor", "variant": "tf"}, "unknown optimizer.variant 'tf'"),
        ({"name": "adafactor", "eps": 1e-8}, "optimizer.eps: expected two numbers, got 1e-08"),
        ({"eps": [1e-8, 1e-8]}, "optimizer.eps: expected one number, got [1e-08, 1e-08]"),
        ({"betas": [0.9, 1.0]}, "argument 'betas': got (0.9, 1.0), expected two numbers in [0, 1)"),
        ({"name": "sgd", "nesterov": True, "momentum": 0.0}, "argument 'nesterov': got True, expected a momentum"),
        ({"name": "adafactor", "clip_threshold": 0.5}, "argument 'd': got 0.5, expected a number >= 1"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay: expected 0.0 or more, got -1.0"),
        ({"name": "adafactor", "beta2_decay": 0.5}, "argument 'beta2_decay': got 0.5, expected a number <= 0"),
    ],
)  # fmt: skip
def test_unfitting_settings_are_named(table: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        from_table({"optimizer": table})
    assert sentence in str(caught.value)


def test_another_optimizer_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    hf = {"name": "adafactor", "variant": "hf"}
    train(settings(tmp_path, steps=5, optimizer=hf))
    with pytest.raises(UserError, match="state of optimizer adafactor hf, this run has adamw; use the same"):
        train(settings(tmp_path))
    with pytest.raises(UserError, match="state of optimizer adafactor hf, this run has adafactor torch"):
        train(settings(tmp_path, optimizer={"name": "adafactor"}))


_STEP = """
import sys, torch
from gptcore.models import GPT, presets
from gptcore.optim import AdamW
model = GPT(presets.get("gpt2", {"num_layers": 1, "width": 64, "vocab_size": 64, "attention": {"num_heads": 2}}))
tokens = torch.arange(64)[None]
optimizer = AdamW(model.parameters())
for _ in range(2):
    optimizer.zero_grad()
    model(tokens, tokens).loss.backward()
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
found = {"torch._dynamo", "sympy"} & set(sys.modules)
assert not found, found
"""


def test_training_does_not_load_torchs_compiler():
    """It and SymPy are 80 MB and a second, which a process that compiles nothing has no use for."""
    subprocess.run([sys.executable, "-c", _STEP], check=True)
