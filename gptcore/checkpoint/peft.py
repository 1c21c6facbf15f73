"""Adapters in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

PEFT itself is not needed. Tensors keep their bits and dtypes both ways; ``peft_layers`` says where in a family's
models the layers of ours are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptcore.checkpoint import peft_layers
from gptcore.checkpoint.huggingface import FAMILIES, directory_of, write_config
from gptcore.data.atomic import atomic_file
from gptcore.errors import UserError, unknown_name
from gptcore.models.adapter_spec import AdapterSpec
from gptcore.models.adapters import gpt_of, put_on_empty

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.models import GPT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_EMBEDDINGS = "prompt_embeddings"
_KINDS = {"LORA": "lora", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
# Settings under which PEFT would compute something else, or changed the weights as well, and what they must be.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None), "lora_bias": (False, None), "modules_to_save": (None, []), "use_qalora": (False, None),
    "trainable_token_indices": (None,), "alora_invocation_tokens": (None,), "layer_replication": (None,),
    "target_parameters": (None, []), "arrow_config": (None,), "use_bdlora": (None, False), "corda_config": (None,),
    "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
    "num_transformer_submodules": (1, None),
}  # fmt: skip
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def from_peft(
    model: GPT, path: str | os.PathLike[str], *, name: str = "default", family: str | None = None
) -> AdapterSpec:
    """Put PEFT's adapter at ``path`` on ``model``: alone in use and alone trained.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors, or a name on the hub.
        name: of the adapter here.
        family: transformers' model_type of the model it was made for; default the one whose layers it names.

    Returns:
        Its settings, as far as they are the same for all layers.

    Raises:
        UserError: no such adapter, a kind or setting that is not computed here, tensors that are missing, of another
            shape or left over, another model than it was made for. The model is as it was then.
    """
    directory = directory_of(path)
    config = _config(directory / CONFIG)
    tensors = _tensors(directory / WEIGHTS)
    gpt = gpt_of(model)
    kind = _kind(config)
    if kind in ("prompt", "prefix"):
        return _put_tokens(gpt, kind, tensors, name)
    names = peft_layers.names_for(gpt, tensors, _families(gpt, family))
    spec = AdapterSpec(
        kind="dora" if config.get("use_dora") else "lora", rank=config["r"], alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")), dropout=config.get("lora_dropout") or 0.0,
    )  # fmt: skip
    updates = peft_layers.read(gpt, names, tensors, config)
    put_on_empty(gpt, spec, {p: [u.part for u in each] for p, each in updates.items()}, name=name)
    peft_layers.fill(gpt, name, updates)
    return spec


def to_peft(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    family: str | None = None,
    like: str | os.PathLike[str] | None = None,
    base: str | None = None,
) -> None:
    """Write adapter ``name`` to directory ``path``, as PEFT's ``from_pretrained`` reads it over ``to_hf``'s model.

    Args:
        family: transformers' model_type; default the first that can express the model, as for ``to_hf``.
        like: a directory whose adapter_config.json is taken over as it is; that of :func:`from_peft`, say.
        base: name or path of the model it is for, for adapter_config.json.

    Raises:
        UserError: no such adapter, no family computes the model, a layer that the family stores as a whole and the
            adapter has in parts, a directory that cannot be written.
    """
    gpt = gpt_of(model)
    if name not in gpt.adapter_specs:
        raise unknown_name("adapter", name, gpt.adapter_specs)
    spec = gpt.adapter_specs[name]
    if spec.low_rank:
        hf = write_config(gpt.config, family)
        tensors, config = peft_layers.write(gpt, name, hf["model_type"], spec)
    else:
        _refuse_scaled(gpt, spec.kind)
        assert gpt.virtual_tokens is not None
        tokens = gpt.virtual_tokens.adapters[name]
        tensors, config = {_EMBEDDINGS: tokens.weight}, _tokens_config(gpt, spec)  # type: ignore[dict-item]
    config |= {
        "base_model_name_or_path": base, "inference_mode": True, "modules_to_save": None, "task_type": "CAUSAL_LM",
        "revision": None, "auto_mapping": None,
    }  # fmt: skip
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    _write(Path(path), tensors, text if like is None else (Path(like) / CONFIG).read_bytes())


def _kind(config: Mapping[str, Any]) -> str:
    """Which kind of adapter; refuses what would be computed otherwise here."""
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise unknown_name("peft_type", str(kind), _KINDS)
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise UserError(f"{CONFIG}: {key} = {config[key]!r} is not computed here; expected {plain[0]!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_WEIGHTS):
        raise UserError(
            f"{CONFIG}: init_lora_weights = {start!r} changed the model's own weights; convert the adapter to plain "
            "LoRA first (PEFT's path_initial_model_for_weight_conversion)"
        )
    return _KINDS[kind]


def _families(gpt: GPT, family: str | None) -> list[str]:
    """The families that ``gpt`` may be of."""
    if family is not None:
        return [str(write_config(gpt.config, family)["model_type"])]
    found = []
    for name in FAMILIES:
        try:
            write_config(gpt.config, name)
        except UserError:
            continue
        found.append(name)
    return found


def _put_tokens(gpt: GPT, kind: str, tensors: Mapping[str, Tensor], name: str) -> AdapterSpec:
    _refuse_scaled(gpt, kind)
    if set(tensors) != {_EMBEDDINGS}:
        raise UserError(f"{WEIGHTS}: holds {sorted(tensors)}, expected '{_EMBEDDINGS}' alone")
    values, config = tensors[_EMBEDDINGS], gpt.config
    width = config.table_width
    if kind == "prefix":
        width = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    if values.dim() != 2 or values.shape[1] != width:
        raise UserError(
            f"{WEIGHTS}: '{_EMBEDDINGS}' has shape {tuple(values.shape)}, this model asks for (tokens, {width})"
        )
    spec = AdapterSpec(kind=kind, tokens=values.shape[0])  # type: ignore[arg-type]
    put_on_empty(gpt, spec, {}, name=name)
    assert gpt.virtual_tokens is not None
    tokens = gpt.virtual_tokens.adapters[name].to(values.dtype)
    with torch.no_grad():
        tokens.weight.copy_(values)  # type: ignore[operator, union-attr]
    return spec


def _refuse_scaled(gpt: GPT, kind: str) -> None:
    if kind == "prompt" and gpt.config.embedding_scale != 1.0:
        raise UserError(
            "prompt tuning: this model scales its embeddings, PEFT's soft prompts are not scaled with them; "
            "use lora or prefix"
        )


def _tokens_config(gpt: GPT, spec: AdapterSpec) -> dict[str, Any]:
    config = gpt.config
    shared = {
        "num_virtual_tokens": spec.tokens, "num_layers": config.num_layers, "num_transformer_submodules": 1,
    }  # fmt: skip
    if spec.kind == "prompt":
        return {
            "peft_type": "PROMPT_TUNING", "token_dim": config.table_width, "num_attention_heads": config.num_heads,
            "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None, **shared,
        }  # fmt: skip
    width = config.num_kv_heads * config.head_dim
    return {
        "peft_type": "PREFIX_TUNING", "token_dim": width, "num_attention_heads": config.num_kv_heads,
        "encoder_hidden_size": width, "prefix_projection": False, **shared,
    }  # fmt: skip


def _config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected the directory of a PEFT adapter") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the weights of a PEFT adapter as safetensors")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _write(directory: Path, tensors: Mapping[str, Tensor], config: bytes) -> None:
    """Weights first: a directory with a configuration is a whole adapter, or an older one's weights are newer."""
    from safetensors.torch import save

    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(directory / WEIGHTS) as file:
        file.write(save(plain, {"format": "pt"}))
    with atomic_file(directory / CONFIG) as file:
        file.write(config)
