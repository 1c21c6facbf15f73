"""``attn_implementation="gptcore"``: transformers' attention over ``gptcore.ops.attention``.

transformers asks two functions: one makes a mask for each forward, the other computes attention in every layer. The
contract between them is that of its "sdpa": no mask means causal for more than one query and everything for a single
one, with keys beyond the queries cut off (an empty static cache). Here no mask can also mean a plain sliding
window, which the kernel skips by blocks; it comes to the layer as ``sliding_window``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptcore import backend, ops
from gptcore.ops.attention import attention_reference

ATTENTION_NAME = "gptcore"
CALL = "transformers attention"

# Families whose layers pass their window on to the attention function, as their flash attention needs it.
_PASS_THEIR_WINDOW = frozenset(
    {"mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3", "gemma3_text"}
)


def register() -> None:
    """Make ``attn_implementation="gptcore"`` known to transformers, for any model that lets attention be chosen.

    Then ``AutoModelForCausalLM.from_pretrained(..., attn_implementation="gptcore")``, or
    ``model.set_attn_implementation("gptcore")``. Calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or is older than 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "gptcore.integrations.huggingface needs transformers 5: pip install 'gptcore[hf]'"
        ) from error
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    # Without a mask function of the same name transformers makes no mask at all, and padding would be attended.
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """transformers' boolean mask (B, 1, T, S), or None where the kernel needs none.

    Arguments are those of transformers' mask functions.
    """
    from transformers.masking_utils import sdpa_mask

    whole = isinstance(q_offset, int) and q_offset == kv_offset and 1 < q_length == kv_length
    windowed = local_size is not None and getattr(config, "model_type", None) in _PASS_THEIR_WINDOW
    if allow_is_causal_skip and windowed and whole and _all_seen(attention_mask):
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip, config=config, **options,
    )  # fmt: skip


def _all_seen(mask: Tensor | None) -> bool:
    """Whether no token is padding; reading the mask would break a compiler's graph."""
    return mask is None or (not torch.compiler.is_compiling() and bool(mask.all()))


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers' layers: (B, T, H, D) and None, for query (B, H, T, D), key and value (B, Hkv, S, D).

    ``attention_mask``: boolean (True attends) or added to the scores; (B or 1, H or 1, T, S). What the kernel does not
    cover (the weights of attention too) goes to transformers' own sdpa or eager attention and is named in
    ``gptcore.backend.report()``.
    """
    from gptcore.integrations.huggingface import attention_weights

    cache = options.get("cache")
    if cache is not None:  # continuous batching keeps its keys in pages
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    # no mask although the layer has a window: its queries are the last keys, see attention_mask
    left = sliding_window - 1 if causal and sliding_window is not None else -1
    eager = attention_weights.eager_if_wanted(module, options)
    if eager is not None:
        backend.note_fallback(CALL, "output_attentions")
        mask = attention_weights.additive_mask(attention_mask, query, key.shape[2], causal, left)
        if position_bias is not None:
            options["position_bias"] = position_bias
        result: tuple[Tensor, Tensor | None] = eager(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, softcap=softcap, s_aux=s_aux, **options
        )  # fmt: skip
        return result
    reason = _uncovered(query, key, value, attention_mask)
    if reason:
        backend.note_fallback(CALL, reason)
        if softcap is None and s_aux is None and left < 0:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout,
                scaling,
                causal,
                position_bias=position_bias,
            )
    attend = attention_reference if reason else ops.attention
    out = attend(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        causal=causal, window_size=(left, -1), softmax_scale=scaling, soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
        dropout_p=dropout, seed=torch.randint(2**63 - 1, (1,), device=query.device) if dropout else None,
        **_scores_options(attention_mask, position_bias, key.shape[2], query.dtype),
    )  # fmt: skip
    return out, None


def _scores_options(
    mask: Tensor | None, position_bias: Tensor | None, keys: int, dtype: torch.dtype
) -> dict[str, Any]:
    """transformers' mask and bias as ``attn_mask`` and ``attn_bias``, with keys of their own."""
    options: dict[str, Any] = {}
    if mask is not None:
        mask = mask[..., :keys]  # a static cache's mask may be longer than the keys
        options["attn_mask" if mask.dtype == torch.bool else "attn_bias"] = mask
    if position_bias is not None:
        added = options.get("attn_bias")
        options["attn_bias"] = position_bias if added is None else position_bias + added
    if "attn_bias" in options:
        options["attn_bias"] = options["attn_bias"].to(dtype)
    return options


def _uncovered(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why the kernel does not take this call, or None if it does."""
    if reason := backend.why_no_kernels(query.device, "attention"):
        return reason
    known = query.dtype in (torch.float32, torch.bfloat16) or backend.takes_half(query)
    if not known or not query.dtype == key.dtype == value.dtype:
        return f"dtype {query.dtype}"
    if key.shape != value.shape or not 1 <= query.shape[-1] <= 256:
        return "head sizes"
    if 0 in query.shape or 0 in key.shape:
        return "an empty tensor"
    if mask is not None and mask.ndim != 4:
        return "number of the mask's dimensions"
    return None


def choose(model: torch.nn.Module, report: Any) -> None:
    """Give transformers' models in ``model`` this attention, for :func:`gptcore.integrations.swap.replace` and its
    report; an adapter's or a trainer's wrapper may hold them."""
    from gptcore.integrations.huggingface import own_attention

    for name, part in _outermost_models(model):
        if not part.is_backend_compatible():
            if not own_attention.is_swapped(part):
                report.leave(type(part).__name__, "its attention is its own", name or "the model")
            continue
        before = part.config._attn_implementation
        if before != ATTENTION_NAME:
            register()
            part.set_attn_implementation(ATTENTION_NAME)
            part._gptcore_attention_before = before
        report.swapped.setdefault("attention", []).append(name or "the model")


def _outermost_models(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """transformers' models in ``model`` that are not parts of another one, by name."""
    found: list[tuple[str, Any]] = []
    for name, part in model.named_modules():
        inner = any(not outer or name.startswith(f"{outer}.") for outer, _ in found)
        if not inner and hasattr(type(part), "is_backend_compatible"):
            found.append((name, part))
    return found


def restore(model: torch.nn.Module) -> None:
    """Give the models in ``model`` the attention they had before :func:`choose`."""
    for part in model.modules():
        before = part.__dict__.pop("_gptcore_attention_before", None)
        if before is not None:
            part.set_attn_implementation(before)  # type: ignore[operator]
