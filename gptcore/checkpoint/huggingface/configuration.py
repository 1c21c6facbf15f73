"""``config.json`` of a Hugging Face model to ``GPTConfig`` and back, family by family.

A family is a pair of functions: ``read`` refuses, by name, every setting that ``GPT`` would compute differently,
and ``write`` need not check anything, because :func:`write_config` reads back what it wrote and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptcore.checkpoint.huggingface import gpt_families, llama_families
from gptcore.checkpoint.huggingface.settings import Config
from gptcore.errors import UserError, unknown_name
from gptcore.models import GPTConfig

# Fields that say how a model is trained or initialised, which a published configuration does not carry.
_TRAINING = {"init": "gpt2", "init_std": None, "embedding_grad_shrink": 1.0}


class Family(NamedTuple):
    """``architecture``: the class that transformers builds; ``read`` and ``write``: see the top of the file."""

    architecture: str
    read: Callable[[Config], GPTConfig]
    write: Callable[[GPTConfig], Config]


# What published files of models that also see leave to transformers' defaults for their language part.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072
}  # fmt: skip


def language_part(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model inside one that also sees (Gemma 3); any other as it is."""
    if hf.get("model_type") != "gemma3" or not isinstance(hf.get("text_config"), Mapping):
        return hf
    outer = {key: hf[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if key in hf}
    return {**_GEMMA3_DEFAULTS, **outer, **hf["text_config"], "model_type": "gemma3_text"}


def family_of(hf: Mapping[str, Any]) -> str:
    """The name of the family that ``config.json``'s ``model_type`` gives. Raises UserError for one not known."""
    name = language_part(hf).get("model_type")
    if not isinstance(name, str):
        raise UserError(
            "config.json: has no 'model_type'; expected the configuration of a transformers model"
        )
    if name not in FAMILIES:
        raise unknown_name("model_type", name, FAMILIES)
    return name


def read_config(hf: Mapping[str, Any]) -> GPTConfig:
    """The ``GPTConfig`` that computes what transformers does under ``hf``.

    Raises:
        UserError: an unknown family, or a setting that ``GPT`` has no counterpart for.
    """
    try:
        return FAMILIES[family_of(hf)].read(dict(language_part(hf)))
    except KeyError as error:
        raise UserError(f"config.json: has no {error}") from None


def write_config(config: GPTConfig, family: str | None = None) -> Config:
    """A ``config.json`` under which transformers computes what ``GPT(config)`` does.

    family: one of ``FAMILIES``; default the first that can express ``config``. Raises UserError where none can,
    with what stands in the way.
    """
    if family is not None and family not in FAMILIES:
        raise unknown_name("model_type", family, FAMILIES)
    obstacles: list[str] = []
    for name in [family] if family else FAMILIES:
        written = {"model_type": name, "architectures": [FAMILIES[name].architecture]}
        written |= FAMILIES[name].write(config)
        obstacle = _difference(config, written)
        if obstacle is None:
            return written
        obstacles.append(f"{name}: {obstacle}")
    raise UserError(f"no Hugging Face family computes this model; {'; '.join(obstacles)}")


def _difference(config: GPTConfig, written: Config) -> str | None:
    """The first field that a reader of ``written`` would see otherwise, or None."""
    try:
        back = read_config(written)
    except UserError as error:
        return str(error)
    wanted, found = _comparable(config), _comparable(back)
    key = next((key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)), None)
    return None if key is None else f"{key} would be {found.get(key)}, not {wanted.get(key)}"


def _comparable(config: GPTConfig) -> dict[str, Any]:
    """Every field by its path, with what it stands for in place of None, and without fields of no effect."""
    layers = range(config.num_layers)
    resolved = config.merged(_TRAINING).to_dict()
    flat: dict[str, Any] = {}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = value

    walk("", resolved)
    for key in ("attention.window", "attention.pattern", "position.base", "position.scaled"):
        flat.pop(key, None)
    if config.position.kind != "rotary":
        flat = {key: value for key, value in flat.items() if not key.startswith("position.")}
        flat |= {"position.kind": config.position.kind, "position.offset": config.position.offset}
    else:
        flat["rotary"] = [(config.rotary_base(i), config.position.scaling_of(i).to_dict()) for i in layers]
        flat |= {"position.rotary_fraction": None, "position.rotary_dim": config.rotary_dim}
        flat = {key: value for key, value in flat.items() if not key.startswith("position.scaling")}
    if config.position.kind in ("alibi", "none"):
        flat.pop("context_length")
    flat = {key: value for key, value in flat.items() if not key.startswith("moe.")} | _experts(config)
    flat |= {
        "attention.num_kv_heads": config.num_kv_heads, "attention.head_dim": config.head_dim,
        "attention.softmax_scale": config.attention.softmax_scale or config.head_dim**-0.5,
        "attention.windows": [config.window_size(i) for i in layers],
        "mlp.hidden_size": None if len(config.expert_layers) == len(layers) else config.hidden_size,
        "norm.bias": config.norm.has_bias,
        "norm.final": config.norm.has_final, "embedding_width": config.table_width,
    }  # fmt: skip
    return flat


def _experts(config: GPTConfig) -> dict[str, Any]:
    """What counts of layers of experts where nothing is trained."""
    moe = config.moe
    if moe is None:
        return {}
    factor = moe.capacity_factor if moe.eval_capacity_factor is None else moe.eval_capacity_factor
    return {
        "moe.num_experts": moe.num_experts, "moe.top_k": moe.top_k, "moe.layers": config.expert_layers,
        "moe.hidden_size": config.expert_hidden_size, "moe.shared_experts": moe.shared_experts,
        "moe.renormalise": moe.top_k > 1 if moe.renormalise is None else moe.renormalise,
        "moe.eval_capacity_factor": factor, "moe.noise": moe.noise,
    }  # fmt: skip


# In the order in which a configuration of ours looks for one that fits.
FAMILIES: Mapping[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", gpt_families.read_gpt2, gpt_families.write_gpt2),
    "llama": Family("LlamaForCausalLM", llama_families.read_llama, llama_families.write_llama),
    "opt": Family("OPTForCausalLM", gpt_families.read_opt, gpt_families.write_opt),
    "bloom": Family("BloomForCausalLM", gpt_families.read_bloom, gpt_families.write_bloom),
    "gpt_neox": Family("GPTNeoXForCausalLM", gpt_families.read_gpt_neox, gpt_families.write_gpt_neox),
    "gptj": Family("GPTJForCausalLM", gpt_families.read_gptj, gpt_families.write_gptj),
    "falcon": Family("FalconForCausalLM", gpt_families.read_falcon, gpt_families.write_falcon),
    "mistral": Family("MistralForCausalLM", llama_families.read_mistral, llama_families.write_mistral),
    "mixtral": Family("MixtralForCausalLM", llama_families.read_mixtral, llama_families.write_mixtral),
    "qwen2": Family("Qwen2ForCausalLM", llama_families.read_qwen2, llama_families.write_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", llama_families.read_qwen3, llama_families.write_qwen3),
    "gemma2": Family("Gemma2ForCausalLM", llama_families.read_gemma2, llama_families.write_gemma),
    "gemma3_text": Family("Gemma3ForCausalLM", llama_families.read_gemma3, llama_families.write_gemma3),
    "glm": Family("GlmForCausalLM", llama_families.read_glm, llama_families.write_glm),
    "glm4": Family("Glm4ForCausalLM", llama_families.read_glm4, llama_families.write_glm),
}
