"""GPT-2's block of transformers for few tokens without gradients: its modules' kernels without the modules' calls.

Decoding one token calls a dozen modules a block, each of which asks anew what its input is; together that is as long as
a small batch's products take. Here it is asked once, and a block that is not made of what it was built with, or whose
parts somebody listens to, runs as transformers wrote it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptcore import ops
from gptcore.integrations import torch_modules
from gptcore.integrations.huggingface import attention, cache, modules
from gptcore.integrations.swap import Rule, original_forward, random_input, runs
from gptcore.nn.linear import SMALL
from gptcore.nn.support import is_watched


class _Parts(NamedTuple):
    norm1: Any
    attention: Any
    qkv: Any
    out: Any
    norm2: Any
    up: Any
    down: Any


def _block(
    module: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = False,
    **options: Any,
) -> Any:
    parts = None
    if encoder_hidden_states is None and _few(hidden_states):
        parts = _parts(module._modules, hidden_states)
    if parts is None or not cache.plain(past_key_values):
        return original_forward(
            module, hidden_states, past_key_values, attention_mask, encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask, use_cache=use_cache, **options,
        )  # fmt: skip
    shape = hidden_states.shape
    x = hidden_states.reshape(-1, shape[-1])
    attended = _attend(parts, _normed(x, parts.norm1), shape, past_key_values, attention_mask, options)
    norm2 = parts.norm2
    y, x = ops.layer_norm(_product(attended, parts.out), norm2.weight, norm2.bias, norm2.eps, residual=x)
    y = ops.gelu(_product(y, parts.up), approximate="tanh")
    return (_product(y, parts.down) + x).view(shape)


def _attend(
    parts: _Parts, x: Tensor, shape: torch.Size, past: Any, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """The heads' results (rows, C) for the normed rows x."""
    layer = parts.attention
    heads = _product(x, parts.qkv).view(shape[0], shape[1], 3, layer.num_heads, layer.head_dim)
    query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
    if past is not None:
        key, value = cache.append(past, key, value, layer.layer_idx)
    attended, _ = attention.attention_forward(
        layer, query, key, value, mask, scaling=layer.scaling, **options
    )
    return attended.reshape(x.shape)


def _product(x: Tensor, layer: Any) -> Tensor:
    return ops.matmul(x, layer.weight, bias=layer.bias)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _few(x: Tensor) -> bool:
    return (
        x.ndim == 3
        and 0 < x.shape[0] * x.shape[1] <= SMALL
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _parts(block: dict[str, nn.Module], x: Tensor) -> _Parts | None:
    """The modules whose kernels make up the block, or None if one is not what the block was built with."""
    layer: Any = block["attn"]
    mlp: Any = block["mlp"]
    if (
        not (_is(layer, "GPT2Attention") and _is(mlp, "GPT2MLP"))
        or layer.config._attn_implementation != attention.ATTENTION_NAME
    ):
        return None
    inner, outer = layer._modules, mlp._modules
    norms = block["ln_1"], block["ln_2"]
    products = inner["c_attn"], inner["c_proj"], outer["c_fc"], outer["c_proj"]
    swapped = (
        all(_unwatched(n, torch_modules.layer_norm) and _fits(n, x) for n in norms)
        and all(_unwatched(p, modules.conv1d) and _fits(p, x) for p in products)
        and _unwatched(outer["act"], modules.gelu_tanh)
    )
    dropouts = inner["resid_dropout"], outer["dropout"]
    if (
        not swapped
        or not all(_does_nothing(d) for d in dropouts)
        or (layer.training and inner["attn_dropout"].p)
    ):
        return None
    return _Parts(norms[0], layer, *products[:2], norms[1], *products[2:])


def _is(module: nn.Module, name: str) -> bool:
    kind = type(module)
    return kind.__name__ == name and modules.is_theirs(module) and not is_watched(module)


def _unwatched(module: Any, forward: Any) -> bool:
    """Whether a call of the module is this forward and nothing else."""
    return runs(module, forward) and not is_watched(module)


def _fits(module: Any, x: Tensor) -> bool:
    weight, bias = module.weight, module.bias
    return weight is not None and bias is not None and weight.dtype == bias.dtype == x.dtype


def _does_nothing(module: Any) -> bool:
    return type(module) is nn.Dropout and not (module.training and module.p) and not is_watched(module)


def _is_block(module: nn.Module) -> bool:
    return (
        modules.is_theirs(module)
        and type(module).__name__ == "GPT2Block"
        and not hasattr(module, "crossattention")
    )


RULES = [
    Rule(
        "GPT-2 block without gradients", _is_block, _block,
        lambda module: (random_input(module.ln_1.weight, 1, 3, *module.ln_1.normalized_shape),),
    ),
]  # fmt: skip
