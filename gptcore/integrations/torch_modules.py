"""torch's own modules over ``gptcore.functional``, as rules for :func:`gptcore.integrations.swap.replace`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gptcore.functional as F
from gptcore.integrations import autocast_linear
from gptcore.integrations.swap import Rule, original_forward, random_input, row

# Where a swapped embedding finds the gptcore.models.tied.TiedTable of a forward pass whose head is its weight too.
TIED_TABLE = "_gptcore_tied_table"


def layer_norm(module: Any, input: Tensor) -> Tensor:
    return F.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)


def _rms_norm(module: Any, input: Tensor) -> Tensor:
    return F.rms_norm(input, module.normalized_shape, module.weight, module.eps)


def _gelu(module: Any, input: Tensor) -> Tensor:
    return F.gelu(input, approximate=module.approximate)


def _silu(module: Any, input: Tensor) -> Tensor:
    return F.silu(input, inplace=module.inplace)


def embedding(module: Any, input: Tensor) -> Tensor:
    table = module.__dict__.get(TIED_TABLE)
    if table is not None:
        rows: Tensor = table.rows(input)
        return rows
    return F.embedding(
        input, module.weight, module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq,
        module.sparse,
    )  # fmt: skip


def _linear(module: Any, input: Tensor) -> Tensor:
    """Few rows without gradients on the kernel, and training under autocast; other products torch does at the limit."""
    if autocast_linear.takes(input, module.weight, module.bias):
        return autocast_linear.autocast_linear(input, module.weight, module.bias, transposed=False)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type):
        return original_forward(module, input)
    return F.linear(input, module.weight, module.bias)


def _normed(module: Any) -> tuple[Tensor]:
    return (random_input(module.weight, 3, *module.normalized_shape),)


def _is(kind: type[nn.Module]) -> Any:
    """Exactly torch's class: a subclass may compute anything."""
    return lambda module: type(module) is kind


RULES = [
    Rule("LayerNorm", _is(nn.LayerNorm), layer_norm, _normed),
    Rule("RMSNorm", _is(nn.RMSNorm), _rms_norm, _normed),
    Rule("GELU", _is(nn.GELU), _gelu, row),
    Rule(
        "SiLU", _is(nn.SiLU), _silu, row,
        lambda module: "it writes its input" if module.inplace else None,
    ),
    Rule(
        "Embedding", _is(nn.Embedding), embedding, lambda module: (torch.arange(min(3, module.num_embeddings)),),
        lambda module: (
            "max_norm, scale_grad_by_freq or sparse"
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse
            else None
        ),
    ),
    Rule(
        "Linear, few rows or autocast", _is(nn.Linear), _linear,
        lambda module: (random_input(module.weight, 3, module.in_features),),
    ),
]  # fmt: skip
