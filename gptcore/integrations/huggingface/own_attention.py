"""Attention that BLOOM, GPT-J and Falcon compute in layers of their own, as rules for ``gptcore.replace``.

Their layers are handed a mask that is added to the scores, and ALiBi as a term of each key; what is around the
attention (projections, cache, dropout) stays theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptcore import backend
from gptcore.integrations.huggingface import rotary
from gptcore.integrations.huggingface.attention import CALL, attention_forward
from gptcore.integrations.swap import Rule, original_forward, random_input, runs


def _stays(hidden_states: Tensor, output_attentions: bool) -> bool:
    """Whether this call is left to the layer as it was, and counted."""
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    reason = "output_attentions" if output_attentions else None
    kernel = "attention_f16" if dtype == torch.float16 and device != "cpu" else "attention"
    known = dtype in (torch.float32, torch.bfloat16) or kernel == "attention_f16"
    if not (known and backend.has_kernels(hidden_states.device, kernel)):
        reason = f"dtype {dtype} on {device}"
    if reason is not None:
        backend.note_fallback(CALL, reason)
    return reason is not None


def _bloom(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if _stays(hidden_states, output_attentions):
        result: tuple[Tensor, Tensor | None] = original_forward(
            module, hidden_states, residual, alibi, attention_mask, layer_past, use_cache, output_attentions, **options
        )  # fmt: skip
        return result
    q, k, v = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    bias = alibi.view(q.shape[0], module.num_heads, 1, -1)
    out = module.dense(_attend(module, q, k, v, attention_mask, module.attention_dropout, bias))
    return residual + nn.functional.dropout(out, module.hidden_dropout, module.training), None


def _gptj(
    module: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if position_ids is None or _stays(hidden_states, bool(output_attentions)):
        result: tuple[Tensor, Tensor | None] = original_forward(
            module, hidden_states, layer_past, attention_mask, position_ids, use_cache, output_attentions, **options
        )  # fmt: skip
        return result
    heads = (*hidden_states.shape[:-1], module.num_attention_heads, module.head_dim)
    q, k, v = (p(hidden_states).view(heads) for p in (module.q_proj, module.k_proj, module.v_proj))
    sin, cos = module.embed_positions[position_ids.reshape(-1)].float().chunk(2, dim=-1)
    q, k = (rotary.turn(x, cos.contiguous(), sin.contiguous(), interleaved=True) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    out = _attend(module, q, k, v, attention_mask, module.attn_dropout)
    return module.resid_dropout(module.out_proj(out)), None


def _falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if _stays(hidden_states, output_attentions):
        result: tuple[Tensor, Tensor | None] = original_forward(
            module, hidden_states, alibi, attention_mask, position_ids, layer_past, use_cache, output_attentions,
            position_embeddings, **options,
        )  # fmt: skip
        return result
    q, k, v = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    if alibi is None and position_embeddings is not None:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        q, k = rotary.turn_both(apply_rotary_pos_emb, q, k, *position_embeddings)
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    bias = dropout = None
    if alibi is not None:
        dropout = module.attention_dropout
        # the model has added ALiBi to the mask, which is all that its sdpa does; its eager attention adds it again
        if module.config._attn_implementation != "sdpa":
            bias = module.inv_norm_factor * alibi.view(q.shape[0], module.num_heads, 1, -1)
    return module.dense(_attend(module, q, k, v, attention_mask, dropout, bias)), None


def _attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: nn.Dropout | None,
    bias: Tensor | None = None,
) -> Tensor:
    """(B, T, H * D) for q (B, H, T, D), k and v (B, Hkv, S, D), ``mask`` and ``bias`` added to the scores."""
    out, _ = attention_forward(
        module, q, k, v, _plain(mask, k.shape[2]), dropout.p if dropout is not None and module.training else 0.0,
        q.shape[-1] ** -0.5, True, position_bias=bias,
    )  # fmt: skip
    return out.flatten(2)


def _plain(mask: Tensor | None, keys: int) -> Tensor | None:
    """None for a mask that only says causal, a boolean one for a mask that only hides, else ``mask`` itself.

    All layers share a mask, so the answer is kept with it. To look at its numbers would break a compiler's graph.
    """
    if mask is None or mask.shape[-2] == 1 or not mask.is_floating_point() or torch.compiler.is_compiling():
        return mask
    version = None if mask.is_inference() else mask._version  # of the numbers, which a user may change
    kept = getattr(mask, "gptcore_plain", None)
    if kept is None or kept[0] is None or kept[0] != version:
        kept = mask.gptcore_plain = version, *_read(mask, keys)  # type: ignore[attr-defined]
    _, only_hides, seen = kept
    return seen if only_hides else mask


def _read(mask: Tensor, keys: int) -> tuple[bool, Tensor | None]:
    """Whether a mask only hides, and what it leaves to see; None for all that is not in the future."""
    seen = mask == 0
    if not bool((seen | (mask == torch.finfo(mask.dtype).min)).all()):
        return False, None
    if mask.shape[-2] == keys == mask.shape[-1]:
        causal = torch.ones(keys, keys, dtype=torch.bool, device=mask.device).tril()
        return True, None if bool((seen == causal).all()) else seen
    return True, seen


def _hidden(module: Any, width: int) -> tuple[Tensor, Tensor]:
    """Three tokens and their causal mask."""
    x = random_input(next(module.parameters()), 1, 3, width)
    return x, torch.full((1, 1, 3, 3), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)


def _bloom_inputs(module: Any) -> tuple[Any, ...]:
    x, mask = _hidden(module, module.hidden_size)
    return x, x, random_input(x, module.num_heads, 1, 3), mask


def _gptj_inputs(module: Any) -> tuple[Any, ...]:
    x, mask = _hidden(module, module.embed_dim)
    return x, None, mask, torch.arange(3, device=x.device)[None]


def _falcon_inputs(module: Any) -> tuple[Any, ...]:
    x, mask = _hidden(module, module.hidden_size)
    if module.config.alibi:
        return x, random_input(x, module.num_heads, 1, 3), mask
    angles = random_input(x, 1, 3, module.head_dim // 2).repeat(1, 1, 2)
    return x, None, mask, None, None, False, False, (angles.cos(), angles.sin())


def _slow_but_exact(module: Any) -> str | None:
    return "slow_but_exact" if module.pretraining_tp > 1 and module.slow_but_exact else None


def _is(name: str) -> Any:
    kind = f"transformers.models.{name.lower()}.modeling_{name.lower()}", f"{name}Attention"
    return lambda module: (type(module).__module__, type(module).__name__) == kind


RULES = [
    Rule("attention", _is("Bloom"), _bloom, _bloom_inputs, _slow_but_exact),
    Rule("attention", _is("GPTJ"), _gptj, _gptj_inputs),
    Rule("attention", _is("Falcon"), _falcon, _falcon_inputs),
]


def is_swapped(model: nn.Module) -> bool:
    """Whether one of these rules has swapped layers of ``model``."""
    ours = [rule.forward for rule in RULES]
    return any(runs(module, *ours) for module in model.modules())
