"""TRL's and transformers' names of settings, taken for ours; unknown ones refused by the nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptcore.align.preference_spec import PreferenceSpec
from gptcore.align.reward_spec import RewardSpec
from gptcore.align.stage_settings import read
from gptcore.align.supervised_spec import SFTSpec, with_lengths
from gptcore.align.trl_names import COMMON, STAGES, ours
from gptcore.errors import UserError
from gptcore.models import AdapterSpec
from gptcore.models.schema import Spec
from gptcore.train import TrainConfig

TOML = """
output_dir = "runs/mine"
model_name_or_path = "models/gpt2"
per_device_train_batch_size = 4
gradient_accumulation_steps = 2
max_seq_length = 128
learning_rate = 2e-5
num_train_epochs = 2
packing = true
neftune_noise_alpha = 5
assistant_only_loss = true
completion_only_loss = true
lr_scheduler_type = "constant_with_warmup"
warmup_ratio = 0.1
adam_beta1 = 0.8
adam_beta2 = 0.99
max_grad_norm = 0.5
bf16 = true
gradient_checkpointing = true
logging_steps = 10
save_total_limit = 2
metric_for_best_model = "eval_loss"
greater_is_better = false
processing_class = "mine/tokenizer"
report_to = "none"
"""


def test_a_config_of_trl_s_sft_trainer(tmp_path: Path) -> None:
    (tmp_path / "sft.toml").write_text(TOML)
    table, own = read("sft", tmp_path / "sft.toml", ["max_length=256", "sft.turns=last"])
    spec = SFTSpec.from_dict(own)
    assert (spec.epochs, spec.packing, spec.neftune_alpha, spec.turns) == (2.0, True, 5.0, "last")
    model = {"num_layers": 1, "width": 16, "context_length": 256, "attention": {"num_heads": 2}}
    config = with_lengths({**table, "model": model}, spec, 100)
    assert (config.run_dir, config.start, config.dtype) == ("runs/mine", "models/gpt2", "bfloat16")
    assert (config.data.batch, config.data.accumulate, config.data.length) == (4, 2, 256)
    assert config.data.tokenizer == "mine/tokenizer" and config.steps == 25 and config.schedule.warmup == 3
    assert (config.optimizer.lr, config.optimizer.max_norm, config.optimizer.betas) == (
        2e-5,
        0.5,
        (0.8, 0.99),
    )
    assert config.schedule.name == "constant" and config.memory.activation_checkpointing == "block"
    assert (config.log_every, config.checkpoint.keep_last, config.checkpoint.best) == (10, 2, "val_loss")


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"lerning_rate": 1.0}, "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ({"sft": {"pakcing": True}}, None),
        (
            {"learning_rate": 1.0, "optimizer": {"lr": 2.0}},
            "learning_rate: got 1.0, but optimizer.lr is given as 2.0",
        ),
        ({"completion_only_loss": False}, "completion_only_loss: got False: the loss is on responses only"),
        ({"dataset_name": "trl-lib/tldr"}, "dataset_name: give files of this machine"),
        ({"padding_free": False}, "padding_free: got False: .* nothing is padded"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: unknown value 'cosin'; did you mean 'cosine'"),
        ({"packing_strategy": "wrapped"}, "packing_strategy: got 'wrapped': .* cuts no example"),
    ],
)
def test_what_is_refused(table: dict[str, Any], sentence: str | None) -> None:
    known = ["optimizer", "data", "run_dir"]
    if sentence is None:
        with pytest.raises(UserError, match="did you mean 'sft.packing'"):
            SFTSpec.from_dict(ours(table, "sft", known)["sft"])
        return
    with pytest.raises(UserError, match=sentence):
        ours(table, "sft", known)


def test_their_names_in_our_table_are_as_good_as_at_the_top() -> None:
    found = ours({"sft": {"num_train_epochs": 1, "packing": False, "max_length": 64}}, "sft", ["data"])
    assert found == {"sft": {"epochs": 1, "packing": False}, "data": {"length": 64}}


def test_max_steps_of_minus_one_means_epochs() -> None:
    assert ours({"max_steps": -1}, "sft", []) == {} and ours({"max_steps": 9}, "sft", []) == {"steps": 9}


def test_every_name_leads_to_a_setting_that_there_is() -> None:
    """An alias of a key that is renamed one day would be refused in the user's face; here it fails first."""
    import dataclasses
    import typing

    def exists(spec: type[Spec], path: list[str]) -> bool:
        hints = typing.get_type_hints(spec)
        if path[0] not in {field.name for field in dataclasses.fields(spec)}:  # type: ignore[arg-type]
            return False
        inner = hints[path[0]]
        return (
            len(path) == 1
            or not isinstance(inner, type)
            or not issubclass(inner, Spec)
            or exists(inner, path[1:])
        )

    specs: dict[str, type[Spec]] = {"sft": SFTSpec, "reward": RewardSpec, "preference": PreferenceSpec}
    checked = 0
    for stage in specs:
        for alias in [*COMMON.values(), *STAGES[stage].values()]:
            if isinstance(alias, str):
                path = alias.split(".")
                tables = {stage: specs[stage], "adapter": AdapterSpec}
                there = exists(tables[path[0]], path[1:]) if path[0] in tables else exists(TrainConfig, path)
                assert there, alias
                checked += 1
    assert checked > 20


def test_names_of_adapters_and_of_stages_that_compare() -> None:
    peft = {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["q_proj"], "use_dora": True}
    found = ours({**peft, "loss_type": ["sigmoid"], "beta": 0.2}, "preference", [])
    assert found == {
        "adapter": {"rank": 16, "alpha": 32, "targets": ["q_proj"], "kind": "dora"},
        "preference": {"loss_type": "dpo", "beta": 0.2},
    }
    assert ours({"center_rewards_coefficient": 0.01}, "reward", []) == {"reward": {"centring": 0.01}}
