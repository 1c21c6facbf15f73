"""Where a parameter of ``GPT`` lies in a Hugging Face checkpoint, and in which shape.

Every family is a table of module names. Their tensors become ours by one of four layouts: the same tensor, its
transpose (GPT-2 stores a product's matrix as (in, out)), rows of several tensors one after another (q, k and v;
gate and up; expert after expert), or rows grouped by key/value head (BLOOM, GPT-NeoX, Falcon).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from gptcore.errors import UserError
from gptcore.models import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor


class Names(NamedTuple):
    """``base``: the prefix that a checkpoint of the headless model lacks; ``block``: where layer {} is;
    ``modules``: our module names to theirs, those inside a block without its prefix; several are stacked;
    ``experts``: the same for layers of experts, with {} for the expert."""

    base: str
    block: str
    modules: Mapping[str, str | tuple[str, ...]]
    transposed: bool = False
    grouped: bool = False
    experts: Mapping[str, tuple[str, ...]] = MappingProxyType({})


_GPT2 = Names(
    "transformer.",
    "transformer.h.{}.",
    {
        "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe",
        "stack.final_norm": "transformer.ln_f", "head": "lm_head",
        "norm1": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
        "norm2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    },
    transposed=True,
)  # fmt: skip

_OPT = Names(
    "model.",
    "model.decoder.layers.{}.",
    {
        "token_embedding": "model.decoder.embed_tokens", "position_embedding": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in", "project_out": "model.decoder.project_out",
        "stack.final_norm": "model.decoder.final_layer_norm", "head": "lm_head",
        "norm1": "self_attn_layer_norm",
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": "self_attn.out_proj",
        "norm2": "final_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2",
    },
)  # fmt: skip

_BLOOM = Names(
    "transformer.",
    "transformer.h.{}.",
    {
        "token_embedding": "transformer.word_embeddings",
        "embedding_norm": "transformer.word_embeddings_layernorm",
        "stack.final_norm": "transformer.ln_f", "head": "lm_head",
        "norm1": "input_layernorm", "attention.qkv": "self_attention.query_key_value",
        "attention.out": "self_attention.dense",
        "norm2": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    },
    grouped=True,
)  # fmt: skip

_GPT_NEOX = Names(
    "gpt_neox.",
    "gpt_neox.layers.{}.",
    {
        "token_embedding": "gpt_neox.embed_in", "stack.final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "norm1": "input_layernorm", "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "norm2": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    },
    grouped=True,
)  # fmt: skip

_GPTJ = Names(
    "transformer.",
    "transformer.h.{}.",
    {
        "token_embedding": "transformer.wte", "stack.final_norm": "transformer.ln_f", "head": "lm_head",
        "norm1": "ln_1", "attention.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "attention.out": "attn.out_proj", "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out",
    },
)  # fmt: skip

_FALCON = Names(
    "transformer.",
    "transformer.h.{}.",
    _BLOOM.modules,
    grouped=True,
)
_FALCON_TWO_NORMS = _FALCON._replace(modules={**_FALCON.modules, "norm1": "ln_attn", "norm2": "ln_mlp"})

_LLAMA = Names(
    "model.",
    "model.layers.{}.",
    {
        "token_embedding": "model.embed_tokens", "stack.final_norm": "model.norm", "head": "lm_head",
        "norm1": "input_layernorm",
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
        "attention.out": "self_attn.o_proj",
        "norm2": "post_attention_layernorm", "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": "mlp.down_proj",
    },
)  # fmt: skip
_MIXTRAL = _LLAMA._replace(
    modules={**_LLAMA.modules, "mlp.router": "block_sparse_moe.gate"},
    experts={
        "mlp.up": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        "mlp.down": ("block_sparse_moe.experts.{}.w2",),
    },
)
_GEMMA = _LLAMA._replace(
    modules={
        **_LLAMA.modules, "attention_norm": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
        "mlp_norm": "post_feedforward_layernorm",
    }
)  # fmt: skip
_GLM = _LLAMA._replace(modules={**_LLAMA.modules, "mlp.up": "mlp.gate_up_proj"})
_GLM4 = _GLM._replace(
    modules={**_GLM.modules, "attention_norm": "post_self_attn_layernorm", "mlp_norm": "post_mlp_layernorm"}
)

_NAMES: Mapping[str, Names] = {
    "gpt2": _GPT2, "opt": _OPT, "bloom": _BLOOM, "gpt_neox": _GPT_NEOX, "gptj": _GPTJ, "falcon": _FALCON,
    "llama": _LLAMA, "mistral": _LLAMA, "mixtral": _MIXTRAL, "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma2": _GEMMA,
    "gemma3_text": _GEMMA, "glm": _GLM, "glm4": _GLM4,
}  # fmt: skip

# Constants that old checkpoints carry: masks and rotary frequencies.
CONSTANTS = re.compile(r"(^|\.)(attn\.(masked_)?bias|attention\.(masked_)?bias|(.*\.)?inv_freq)$")


@dataclass(frozen=True)
class Piece:
    """One parameter of ours and the tensors it is made of.

    ``rows`` of each tensor where several are stacked; ``heads`` (Hkv, H / Hkv) where rows are grouped by
    key/value head: H / Hkv query heads, the key's and the value's, D rows each.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    rows: Sequence[int] = ()
    heads: tuple[int, int] | None = None
    shapes: Sequence[tuple[int, ...]] = field(default=())

    def write(self, index: int, tensor: Tensor, parameter: Tensor) -> None:
        """Copy ``tensor``, the index-th of ``theirs``, to its place in ``parameter``, converting the dtype."""
        if self.heads is not None:
            groups, queries = self.heads
            grouped = tensor.unflatten(0, (groups, queries + 2, -1))
            parts = grouped.split([queries, 1, 1], dim=1)
            rows = [part.numel() // max(1, tensor[0].numel()) for part in parts]
            for place, part in zip(parameter.split(rows), parts, strict=True):
                place.copy_(part.flatten(0, 2))
        elif self.rows:
            _rows_of(parameter).split(list(self.rows))[index].copy_(tensor)
        else:
            parameter.copy_(tensor.t() if self.transposed else tensor)

    def read(self, index: int, parameter: Tensor) -> Tensor:
        """The index-th of ``theirs``, contiguous, from ``parameter``."""
        if self.heads is not None:
            groups, queries = self.heads
            size = parameter.shape[0] // (groups * (queries + 2))
            q, k, v = parameter.split([groups * queries * size, groups * size, groups * size])
            import torch

            parts = [part.unflatten(0, (groups, -1, size)) for part in (q, k, v)]
            return torch.cat(parts, dim=1).flatten(0, 2)
        if self.rows:
            return _rows_of(parameter).split(list(self.rows))[index].contiguous()
        return (parameter.t() if self.transposed else parameter).contiguous()


def _rows_of(parameter: Tensor) -> Tensor:
    """Its rows, and those of all experts one after another."""
    return parameter.flatten(0, 1) if parameter.dim() == 3 else parameter


def base_prefix(family: str) -> str:
    """What the names of a checkpoint without head lack."""
    return _NAMES[family].base


def head_weight(family: str) -> str:
    """The name of the head's matrix, which some checkpoints hold although it is tied."""
    return f"{_NAMES[family].modules['head']}.weight"


def pieces(family: str, config: GPTConfig, parameters: Mapping[str, Tensor]) -> list[Piece]:
    """How each of ``GPT(config)``'s ``parameters`` is stored in ``family``."""
    names = _NAMES[family]
    if family == "falcon" and config.norm.parallel == "separate":
        names = _FALCON_TWO_NORMS
    return [_piece(names, config, name, tensor) for name, tensor in parameters.items()]


def _piece(names: Names, config: GPTConfig, ours: str, parameter: Tensor) -> Piece:
    module, _, kind = ours.rpartition(".")
    prefix = ""
    if found := re.fullmatch(r"stack\.blocks\.(\d+)\.(.*)", module):
        prefix, module = names.block.format(found[1]), found[2]
    shape = tuple(parameter.shape)
    if len(shape) == 3 and module in names.experts:
        experts, parts = range(shape[0]), names.experts[module]
        stored = tuple(f"{prefix}{name.format(e)}.{kind}" for e in experts for name in parts)
        rows = [shape[1] // len(parts)] * len(stored)
        return Piece(ours, stored, rows=rows, shapes=[(n, shape[2]) for n in rows])
    if module not in names.modules:
        raise UserError(f"the family stores no '{ours}'")
    theirs = names.modules[module]
    several = (theirs,) if isinstance(theirs, str) else theirs
    stored = tuple(f"{prefix}{name}.{kind}" for name in several)
    if len(stored) > 1:
        rows = _stacked_rows(config, module)
        return Piece(ours, stored, rows=rows, shapes=[(n, *shape[1:]) for n in rows])
    if names.grouped and module == "attention.qkv":
        heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads)
        return Piece(ours, stored, heads=heads, shapes=[shape])
    transposed = names.transposed and len(shape) == 2 and bool(prefix)
    return Piece(ours, stored, transposed=transposed, shapes=[shape[::-1] if transposed else shape])


def _stacked_rows(config: GPTConfig, module: str) -> list[int]:
    if module == "mlp.up":
        return [config.hidden_size] * 2
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [q, kv, kv]
