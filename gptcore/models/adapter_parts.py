"""Where on a GPT adapters go, and the making of what they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from gptcore.errors import UserError
from gptcore.models.adapter_spec import AdapterSpec
from gptcore.models.virtual_tokens import PrefixTokens, SoftPrompt, VirtualTokens
from gptcore.nn.feed_forward import FeedForward
from gptcore.nn.linear import Linear
from gptcore.nn.lora import AdaptedLinear, LowRank, Rows

if TYPE_CHECKING:
    from gptcore.models.block import Attention
    from gptcore.models.gpt import GPT

_LAYERS = ("qkv", "out", "up", "down")


class Part(NamedTuple):
    """One low-rank update to be: the outputs it is of, its rank and what it is multiplied by."""

    rows: Rows
    rank: int
    scale: float


Parts = Mapping[str, Sequence[Part]]  # by the path of a layer


def parts_of(gpt: GPT, spec: AdapterSpec) -> Parts:
    """What ``spec`` asks for.

    Raises:
        UserError: a layer that the model has not.
    """
    missing = set(spec.layers)
    found: dict[str, list[Part]] = {}
    for path in linear_paths(gpt):
        rows = rows_at(gpt, path)
        wanted = [target for target in spec.layers if target in rows]
        missing -= set(wanted)
        if wanted:
            found[path] = [Part(r, spec.rank, spec.scale()) for r in sorted(rows[t] for t in wanted)]
    if "all" in spec.targets and found:
        missing -= set(_LAYERS)  # where all feed-forwards are experts there is none to adapt
    if missing:
        raise UserError(f"adapter.targets: this model has no linear layer '{min(missing)}'")
    return found


def linear_paths(gpt: GPT) -> Iterator[str]:
    """The paths of the layers that may have updates: those of blocks, and a head of its own."""
    for path, module in gpt.named_modules():
        inside = path.startswith("stack.blocks.") and path.rpartition(".")[2] in _LAYERS
        if isinstance(module, Linear) and (inside or path == "head"):
            yield path


def rows_at(gpt: GPT, path: str) -> dict[str, Rows]:
    """The outputs of the linear layer at ``path``, by the names that ``AdapterSpec.targets`` has for them."""
    parent, _, name = path.rpartition(".")
    layer, owner = cast(Linear, gpt.get_submodule(path)), gpt.get_submodule(parent)
    found = {name: Rows(0, layer.out_features)}
    if name == "qkv":
        attention = cast("Attention", owner)
        q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        found |= {"q": Rows(0, q), "k": Rows(q, kv), "v": Rows(q + kv, kv)}
    elif name == "up" and cast(FeedForward, owner).gated:
        half = layer.out_features // 2
        found |= {"gate": Rows(0, half), "value": Rows(half, half)}
    return found


def add_low_rank(gpt: GPT, spec: AdapterSpec, name: str, parts: Parts) -> None:
    """Put updates to be filled on the layers."""
    for path, each in parts.items():
        layer = cast(Linear, gpt.get_submodule(path))
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear.over(layer)
            replace(gpt, path, layer)
        layer.adapters[name] = nn.ModuleList(
            LowRank(
                part.rows, layer.in_features, part.rank, scale=part.scale, dropout=spec.dropout,
                dora=spec.kind == "dora",
            ).to(layer.weight)
            for part in each
        ).train(gpt.training)  # fmt: skip


def add_tokens(gpt: GPT, spec: AdapterSpec, name: str) -> SoftPrompt | PrefixTokens:
    """Put virtual tokens to be filled before every sequence."""
    config = gpt.config
    tokens: SoftPrompt | PrefixTokens
    if spec.kind == "prompt":
        tokens = SoftPrompt(spec.tokens, config.table_width)
    else:
        tokens = PrefixTokens(spec.tokens, config.num_layers, config.num_kv_heads, config.head_dim)
    if gpt.virtual_tokens is None:
        gpt.virtual_tokens = VirtualTokens()
    tokens = tokens.to(gpt.token_embedding.weight)
    gpt.virtual_tokens.adapters[name] = tokens
    return tokens


def layers_with_updates(gpt: GPT) -> list[tuple[str, AdaptedLinear]]:
    """By path."""
    return [(path, module) for path, module in gpt.named_modules() if isinstance(module, AdaptedLinear)]


def modules_of(gpt: GPT, name: str) -> Iterator[nn.Module]:
    """What adapter ``name`` is made of."""
    for module in gpt.modules():
        if isinstance(module, (AdaptedLinear, VirtualTokens)) and name in module.adapters:
            yield module.adapters[name]


def updates_of(gpt: GPT, name: str) -> dict[str, list[LowRank]]:
    """The low-rank updates of adapter ``name``, by the path of their layer."""
    return {path: layer.updates(name) for path, layer in layers_with_updates(gpt) if name in layer.adapters}


def parts_to_plain(gpt: GPT, name: str) -> dict[str, Any]:
    """The parts of adapter ``name`` as plain values."""
    return {
        path: [[*part.rows, part.a.shape[0], part.scale] for part in each]
        for path, each in updates_of(gpt, name).items()
    }


def parts_from_plain(values: Mapping[str, Any]) -> Parts:
    """What :func:`parts_to_plain` told of."""
    return {
        path: [Part(Rows(start, count), rank, scale) for start, count, rank, scale in each]
        for path, each in values.items()
    }


def replace(gpt: GPT, path: str, module: torch.nn.Module) -> None:
    """Put ``module`` at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(gpt.get_submodule(parent), name, module)
