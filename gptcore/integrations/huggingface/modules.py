"""transformers' modules over the kernels, as rules for :func:`gptcore.integrations.swap.replace`.

They are known by their class names within transformers, and a trial shows that they compute what the name says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gptcore.functional as F
from gptcore import ops
from gptcore.integrations import autocast_linear
from gptcore.integrations.swap import Rule, original_forward, random_input, row, runs
from gptcore.nn.linear import SMALL
from gptcore.nn.support import is_watched, served

_TANH = ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation", "GELUTanh", "BloomGelu")
# Gemma's norms multiply by 1 + weight.
_ZERO_CENTRED = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")


def _named(*names: str) -> Callable[[nn.Module], bool]:
    return lambda module: is_theirs(module) and type(module).__name__ in names


def is_theirs(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "transformers"


def _taken(kernel: str, x: Tensor, *parameters: Tensor) -> bool:
    """Whether ``kernel`` takes these, in one dtype; else the module's own forward is called."""
    return served(kernel, x, *parameters) and all(p.dtype == x.dtype for p in parameters)


def _eps(module: Any) -> float:
    return getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    if not _taken("rms_norm", hidden_states, module.weight):
        return original_forward(module, hidden_states)
    return ops.rms_norm(hidden_states, module.weight, _eps(module))


def _rms_norm_zero_centred(module: Any, x: Tensor) -> Tensor:
    if not _taken("rms_norm", x, module.weight):
        return original_forward(module, x)
    return ops.rms_norm(x, module.weight, _eps(module), weight_offset=1.0)


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return is_theirs(module) and type(module).__name__.endswith("RMSNorm") and getattr(weight, "ndim", 0) == 1


def gelu_tanh(module: Any, input: Tensor) -> Tensor:
    return F.gelu(input, approximate="tanh")


def _gelu_erf(module: Any, input: Tensor) -> Tensor:
    return F.gelu(input)


def _silu(module: Any, input: Tensor) -> Tensor:
    return F.silu(input)


def _gate_kind(activation: nn.Module) -> str:
    """ "silu", the form of GELU, or "" for another activation."""
    name = type(activation).__name__
    if name in ("SiLU", "SiLUActivation"):
        return "silu"
    if name in _TANH:
        return "tanh"
    return "none" if name == "GELUActivation" else ""


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    """LLaMA's feed-forward: the activation of the gate and the product with the other half in one pass."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not _taken("gated_activation", gate, up):
        return module.down_proj(module.act_fn(gate) * up)
    kind = _gate_kind(module.act_fn)
    gated = ops.swiglu(gate, up) if kind == "silu" else ops.geglu(gate, up, approximate=kind)
    return module.down_proj(gated)


def _packed_mlp(module: Any, hidden_states: Tensor) -> Tensor:
    """GLM's feed-forward, whose gate and other half are one projection."""
    both = module.gate_up_proj(hidden_states)
    if not _taken("gated_activation", both):
        return original_forward(module, hidden_states)
    kind = _gate_kind(module.activation_fn)
    return module.down_proj(
        ops.swiglu_packed(both) if kind == "silu" else ops.geglu_packed(both, approximate=kind)
    )


def _has(*children: str) -> Callable[[nn.Module], bool]:
    return lambda module: is_theirs(module) and {name for name, _ in module.named_children()} == set(children)


def _unknown_gate(name: str) -> Callable[[nn.Module], str | None]:
    def reason(module: nn.Module) -> str | None:
        activation = getattr(module, name)
        return None if _gate_kind(activation) else f"no gated kernel with {type(activation).__name__}"

    return reason


def _gpt2_mlp(module: Any, hidden_states: Tensor) -> Tensor:
    """In training under autocast the activation is not kept between the two products but computed anew."""
    up, down = module.c_fc, module.c_proj
    form = _gate_kind(module.act)
    plain = all(runs(layer, conv1d) for layer in (up, down))
    plain = plain and form in ("tanh", "none") and not any(map(is_watched, (up, down, module.act)))
    if not plain or not autocast_linear.takes(hidden_states, down.weight, down.bias):
        return original_forward(module, hidden_states)
    product = autocast_linear.autocast_linear(
        up(hidden_states), down.weight, down.bias, transposed=True, gelu=form
    )
    return module.dropout(product)


def conv1d(module: Any, x: Tensor) -> Tensor:
    if autocast_linear.takes(x, module.weight, module.bias):
        return autocast_linear.autocast_linear(x, module.weight, module.bias, transposed=True)
    rows = x.numel() // x.shape[-1]
    few = 0 < rows <= SMALL and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
    if not few or torch.compiler.is_compiling() or not _taken("matmul", x, module.weight, module.bias):
        return original_forward(module, x)
    return ops.matmul(x.reshape(rows, -1), module.weight, bias=module.bias).view(*x.shape[:-1], module.nf)


def _rows_of(name: str) -> Callable[[Any], tuple[Tensor]]:
    """Input for a feed-forward whose first projection is ``name``, whatever wraps it."""

    def inputs(module: Any) -> tuple[Tensor]:
        projection = getattr(module, name)
        return (random_input(next(projection.parameters()), 3, projection.in_features),)

    return inputs


def _small(module: Any) -> tuple[Tensor]:
    """So small that a norm's epsilon shows."""
    return (random_input(module.weight, 3, module.weight.shape[0], scale=1e-3),)


RULES = [
    Rule("RMSNorm", _named(*_ZERO_CENTRED), _rms_norm_zero_centred, _small),
    Rule("RMSNorm", _is_rms_norm, _rms_norm, _small),
    Rule("GELU", _named(*_TANH), gelu_tanh, row),
    Rule("GELU", _named("GELUActivation"), _gelu_erf, row),
    Rule("SiLU", _named("SiLUActivation"), _silu, row),
    Rule(
        "gated feed-forward", _has("gate_proj", "up_proj", "down_proj", "act_fn"), _gated_mlp, _rows_of("gate_proj"),
        _unknown_gate("act_fn"),
    ),
    Rule(
        "gated feed-forward", _has("gate_up_proj", "down_proj", "activation_fn"), _packed_mlp,
        _rows_of("gate_up_proj"), _unknown_gate("activation_fn"),
    ),
    Rule("GPT-2 feed-forward", _named("GPT2MLP"), _gpt2_mlp, lambda m: (random_input(m.c_fc.weight, 3, m.c_fc.nx),)),
    Rule("Conv1D, few rows or autocast", _named("Conv1D"), conv1d, lambda m: (random_input(m.weight, 3, m.nx),)),
]  # fmt: skip
