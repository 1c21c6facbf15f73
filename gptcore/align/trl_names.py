"""The names that TRL and transformers give to settings, taken for ours: in TOML and in ``--set``.

One table for each stage, and one for what their trainers share. A name that is in none, nor ours, is refused by the
nearest one. Where a name would ask for something that is not done here, it is refused in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union

from gptcore.errors import UserError, unknown_name

Table = dict[str, Any]
# Our key, dotted; or a function from the value to what it means here.
Alias = Union[str, Callable[[Any], Mapping[str, Any]]]  # noqa: UP007  evaluated at run time, by Python 3.10 too


def _flag(key: str, when_true: Any, when_false: Any = None) -> Alias:
    def meaning(value: Any) -> Mapping[str, Any]:
        wanted = when_true if value else when_false
        return {} if wanted is None else {key: wanted}

    return meaning


def _only(expected: Any, why: str) -> Alias:
    """A setting of which one value is what happens here anyway."""

    def meaning(value: Any) -> Mapping[str, Any]:
        if value != expected:
            raise UserError(f"got {value!r}: {why}")
        return {}

    return meaning


def _one_of(key: str, names: Mapping[str, Any]) -> Alias:
    def meaning(value: Any) -> Mapping[str, Any]:
        if value not in names:
            raise unknown_name("value", str(value), names)
        return {key: names[value]}

    return meaning


def _nothing(value: Any) -> Mapping[str, Any]:
    """A setting of how their trainers work inside, which changes no result here."""
    return {}


def _max_steps(value: Any) -> Mapping[str, Any]:
    return {"steps": value} if isinstance(value, int) and value > 0 else {}


def _metric(value: Any) -> Mapping[str, Any]:
    return {"checkpoint.best": {"eval_loss": "val_loss", "loss": "val_loss"}.get(value, value)}


def _beta(place: int) -> Alias:
    return lambda value: {f"optimizer.betas.{place}": value}


def _loss_type(value: Any) -> Mapping[str, Any]:
    """TRL's, which may be a list of one."""
    name = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    return {"preference.loss_type": "dpo" if name == "sigmoid" else name}


_PADS = "sequences are laid end to end here, and nothing is padded"
COMMON: dict[str, Alias] = {
    "output_dir": "run_dir",
    "model_name_or_path": "start",
    "processing_class": "data.tokenizer",
    "tokenizer": "data.tokenizer",
    "tokenizer_name_or_path": "data.tokenizer",
    "per_device_train_batch_size": "data.batch",
    "train_batch_size": "data.batch",
    "per_device_eval_batch_size": _nothing,
    "gradient_accumulation_steps": "data.accumulate",
    "max_length": "data.length",
    "max_seq_length": "data.length",
    "max_steps": _max_steps,
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_norm",
    "adam_beta1": _beta(0),
    "adam_beta2": _beta(1),
    "adam_epsilon": "optimizer.eps",
    "optim": _one_of(
        "optimizer.name",
        {
            **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
            "adafactor": "adafactor",
            "sgd": "sgd",
            **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw_8bit"),
        },
    ),
    "lr_scheduler_type": _one_of(
        "schedule.name",
        {
            "linear": "linear",
            "cosine": "cosine",
            "constant": "constant",
            "constant_with_warmup": "constant",
            "inverse_sqrt": "inverse_sqrt",
            "warmup_stable_decay": "wsd",
        },
    ),
    "warmup_steps": "schedule.warmup",
    "logging_steps": "log_every",
    "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "metric_for_best_model": _metric,
    "greater_is_better": _flag("checkpoint.best_mode", "max", "min"),
    "load_best_model_at_end": _nothing,
    "data_seed": _nothing,
    "bf16": _flag("dtype", "bfloat16"),
    "fp16": _flag("dtype", "float16"),
    "gradient_checkpointing": _flag("memory.activation_checkpointing", "block", "none"),
    "use_cpu": _flag("device", "cpu"),
    "no_cuda": _flag("device", "cpu"),
    "use_peft": lambda value: {} if value else _refused("leave the settings of adapters out"),
    "peft_type": _one_of(
        "adapter.kind", {"LORA": "lora", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
    ),
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": lambda value: {"adapter.targets": [value] if isinstance(value, str) else value},
    "use_rslora": "adapter.rslora",
    "use_dora": _flag("adapter.kind", "dora"),
    "num_virtual_tokens": "adapter.tokens",
    "dataset_name": lambda value: _refused("give files of this machine; nothing is fetched from a hub"),
    "padding_free": _only(True, _PADS),
    "pad_token": _nothing,
    "pad_to_multiple_of": _nothing,
    "report_to": _nothing,
    "dataloader_num_workers": _nothing,
    "dataset_num_proc": _nothing,
    "remove_unused_columns": _nothing,
    "use_liger_kernel": _nothing,
    "disable_tqdm": _nothing,
    "group_by_length": _nothing,
    "tf32": _nothing,
    "eval_strategy": _nothing,
    "evaluation_strategy": _nothing,
    "save_strategy": _nothing,
    "logging_strategy": _nothing,
    "do_train": _nothing,
    "do_eval": _nothing,
}
SFT: dict[str, Alias] = {
    "num_train_epochs": "sft.epochs",
    "dataset": "sft.files",
    "train_dataset": "sft.files",
    "eval_dataset": "sft.held_out_files",
    "packing": "sft.packing",
    "eval_packing": _nothing,
    "packing_strategy": _only("bfd", "rows are packed by best-fit decreasing, which cuts no example"),
    "neftune_noise_alpha": lambda value: {"sft.neftune_alpha": value or 0.0},
    "completion_only_loss": _only(
        True, "the loss is on responses only; text without a prompt is learnt whole"
    ),
    "assistant_only_loss": _flag("sft.turns", "all"),
    "chat_template_path": "sft.template",
    "dataset_text_field": "sft.fields.text",
    "warmup_ratio": "sft.warmup_share",
    "truncation_mode": _one_of("sft.overflow", {"keep_start": "truncate", "keep_end": "truncate_prompt"}),
}
PPO: dict[str, Alias] = {
    "num_ppo_epochs": "ppo.epochs",
    "kl_coef": "ppo.beta",
    "kl_estimator": "ppo.kl_estimator",
    "cliprange": "ppo.clip",
    "cliprange_value": "ppo.value_clip",
    "vf_coef": "ppo.value_coefficient",
    "gamma": "ppo.gamma",
    "lam": "ppo.lam",
    "whiten_rewards": "ppo.whiten_rewards",
    "response_length": "ppo.max_new_tokens",
    "missing_eos_penalty": "ppo.missing_end_penalty",
    "temperature": "ppo.temperature",
}
GRPO: dict[str, Alias] = {
    "num_generations": "grpo.samples",
    "num_iterations": "grpo.epochs",
    "max_completion_length": "grpo.max_new_tokens",
    "beta": "grpo.beta",
    "epsilon": "grpo.clip",
    "epsilon_high": "grpo.clip_high",
    "temperature": "grpo.temperature",
    "top_k": "grpo.top_k",
    "top_p": "grpo.top_p",
    "importance_sampling_level": "grpo.ratio",
    "loss_type": _one_of("grpo.aggregation", {name: name for name in ("grpo", "bnpo", "dr_grpo", "dapo")}),
    "scale_rewards": _flag("grpo.estimator", "grpo", "dr_grpo"),
    "entropy_coef": "grpo.entropy_coefficient",
    "use_adaptive_entropy": _only(False, "the weight of the entropy is not adapted here"),
}
REWARD: dict[str, Alias] = {
    "num_train_epochs": "reward.epochs",
    "dataset": "reward.files",
    "train_dataset": "reward.files",
    "center_rewards_coefficient": lambda value: {"reward.centring": value or 0.0},
    "chat_template_path": "reward.template",
}
PREFERENCE: dict[str, Alias] = {
    "num_train_epochs": "preference.epochs",
    "dataset": "preference.files",
    "train_dataset": "preference.files",
    "beta": "preference.beta",
    "loss_type": _loss_type,
    "label_smoothing": "preference.label_smoothing",
    "simpo_gamma": "preference.gamma",
    "desirable_weight": "preference.desirable_weight",
    "undesirable_weight": "preference.undesirable_weight",
    "chat_template_path": "preference.template",
    "precompute_ref_log_probs": _nothing,
}
STAGES: dict[str, dict[str, Alias]] = {
    "sft": SFT, "ppo": PPO, "grpo": GRPO, "reward": REWARD, "preference": PREFERENCE
}  # fmt: skip


def _refused(why: str) -> Mapping[str, Any]:
    raise UserError(why)


def ours(table: Mapping[str, Any], stage: str, known: Iterable[str]) -> Table:
    """``table`` with TRL's names, at its top or in the stage's own table, replaced by what they mean here.

    Args:
        stage: "sft" and so on, a name of ``STAGES``.
        known: our own names at the top of a table.

    Raises:
        UserError: a name of neither side, by the nearest; one that asks for what is not done; a setting given twice.
    """
    names = {**COMMON, **STAGES.get(stage, {})}
    own = set(known) | {stage}
    result: Table = {key: _copied(value) for key, value in table.items() if key in own}
    inside = result.get(stage)
    given = [(name, value) for name, value in table.items() if name not in own]
    if isinstance(inside, dict):  # num_train_epochs in [sft] is as good as at the top
        given += [
            (name, inside.pop(name))
            for name in list(inside)
            if name in names and not _is_ours(names[name], name)
        ]
    for name, value in given:
        if name not in names:
            raise unknown_name("key", name, [*own, *names])
        alias = names[name]
        try:
            meaning = {alias: value} if isinstance(alias, str) else alias(value)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        for key, meant in meaning.items():
            _put(result, key.split("."), meant, name)
    _join_betas(result)
    return result


def _is_ours(alias: Alias, name: str) -> bool:
    """Whether a stage has the very name itself, as ``sft.packing``."""
    return isinstance(alias, str) and alias.split(".")[-1] == name and alias.count(".") == 1


def _put(table: Table, path: list[str], value: Any, name: str) -> None:
    *outer, last = path
    for part in outer:
        table = table.setdefault(part, {})
    if last in table and table[last] != value:
        raise UserError(
            f"{name}: got {value!r}, but {'.'.join(path)} is given as {table[last]!r}; give one of them"
        )
    table[last] = value


def _join_betas(table: Table) -> None:
    """The two momenta, which come apart, as our pair."""
    betas = table.get("optimizer", {}).get("betas") if isinstance(table.get("optimizer"), dict) else None
    if isinstance(betas, dict):
        table["optimizer"]["betas"] = [betas.get("0", 0.9), betas.get("1", 0.95)]


def _copied(value: Any) -> Any:
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
