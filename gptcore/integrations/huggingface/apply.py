"""``apply_gptcore_to_<family>``: one line before a model is built, or on a live one.

The arguments are those of Liger's functions of this kind. Without ``model`` every model of the family that is built
from then on is swapped at the end of its construction; with ``model`` that one is.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptcore.integrations import torch_modules
from gptcore.integrations.huggingface import attention as attention_module
from gptcore.integrations.huggingface import gpt2, loss, modules, own_attention, rotary
from gptcore.integrations.swap import Report, Rule, swap_modules

__all__ = [
    "apply_gptcore_to_bloom", "apply_gptcore_to_gemma2", "apply_gptcore_to_gemma3", "apply_gptcore_to_gpt2",
    "apply_gptcore_to_gpt_neox", "apply_gptcore_to_llama", "apply_gptcore_to_mistral", "apply_gptcore_to_mixtral",
    "apply_gptcore_to_opt", "apply_gptcore_to_qwen2", "apply_gptcore_to_qwen3", "unapply",
]  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """``name``: transformers' folder; ``base``: the class its models share; ``rope``: whether positions rotate."""

    name: str
    base: str
    rope: bool = True

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"


_FAMILIES = {
    family.name: family
    for family in (
        _Family("gpt2", "GPT2PreTrainedModel", rope=False),
        _Family("opt", "OPTPreTrainedModel", rope=False),
        _Family("bloom", "BloomPreTrainedModel", rope=False),
        _Family("gpt_neox", "GPTNeoXPreTrainedModel"),
        _Family("llama", "LlamaPreTrainedModel"),
        _Family("qwen2", "Qwen2PreTrainedModel"),
        _Family("qwen3", "Qwen3PreTrainedModel"),
        _Family("mistral", "MistralPreTrainedModel"),
        _Family("gemma2", "Gemma2PreTrainedModel"),
        _Family("gemma3", "Gemma3PreTrainedModel"),
        _Family("mixtral", "MixtralPreTrainedModel"),
    )
}

# All that a live model is asked for, in this order.
RULES = (*torch_modules.RULES, *modules.RULES, *own_attention.RULES, *gpt2.RULES)

# Rules by the option that chooses them; embeddings, few rows and attention have none in Liger and are always ours.
_BY_OPTION = {
    "RMSNorm": "rms_norm", "LayerNorm": "layer_norm", "GELU": "gelu", "SiLU": "swiglu", "gated feed-forward": "swiglu"
}  # fmt: skip


def _apply(
    name: str, model: nn.Module | None, *, rope: bool, fused_linear_cross_entropy: bool, **options: bool
) -> Report | None:
    family = _FAMILIES[name]
    modeling: Any = importlib.import_module(family.module)
    rules = [r for r in RULES if options.get(_BY_OPTION.get(r.kind, ""), True)]
    if fused_linear_cross_entropy:
        rules.insert(0, loss.RULE)
    attention_module.register()
    if family.rope and rope:
        rotary.patch(modeling, interleaved=False)
    if model is None:
        _swap_when_built(getattr(modeling, family.base), rules)
        return None
    return _swap_built(model, rules)


def _swap_built(model: nn.Module, rules: Sequence[Rule]) -> Report:
    report = Report()
    # The family's own code is known, and a model under construction may have no numbers to try it on.
    swap_modules(model, rules, report, trial=False)
    attention_module.choose(model, report)
    return report


def _swap_when_built(base: Any, rules: Sequence[Rule]) -> None:
    """transformers calls ``post_init`` at the end of every constructor, the outermost model's last."""
    unapplied = getattr(base.post_init, "gptcore_original", base.post_init)

    @functools.wraps(unapplied)
    def post_init(model: Any) -> None:
        unapplied(model)
        swap_modules(model, rules, Report(), trial=False)
        if model.config._attn_implementation == "sdpa":  # transformers' own choice, not the user's
            attention_module.choose(model, Report())

    post_init.gptcore_original = unapplied  # type: ignore[attr-defined]
    base.post_init = post_init


def unapply() -> None:
    """Undo every ``apply_gptcore_to_*`` for models that are built later; ``gptcore.restore`` is for live ones."""
    for family in _FAMILIES.values():
        modeling = sys.modules.get(family.module)
        if modeling is None:
            continue
        base = getattr(modeling, family.base)
        base.post_init = getattr(base.post_init, "gptcore_original", base.post_init)
        if family.rope:
            rotary.unpatch(modeling)


def apply_gptcore_to_gpt2(
    gelu: bool = True,
    layer_norm: bool = True,
    fused_linear_cross_entropy: bool = True,
    model: nn.Module | None = None,
) -> Report | None:
    """gptcore's kernels in transformers' GPT-2.

    Args:
        gelu, layer_norm: which of the model's parts to swap.
        fused_linear_cross_entropy: in training with labels the loss comes without logits (the output's are None);
            ``forward(..., skip_logits=False)`` asks for them.
        model: a live model to swap; default every GPT-2 that is built from now on.

    Returns:
        With ``model``, what was swapped. ``gptcore.restore(model)`` undoes it, :func:`unapply` stops it for new ones.
    """
    return _apply(
        "gpt2", model, rope=False, gelu=gelu, layer_norm=layer_norm,
        fused_linear_cross_entropy=fused_linear_cross_entropy,
    )  # fmt: skip


def apply_gptcore_to_opt(
    layer_norm: bool = True, fused_linear_cross_entropy: bool = True, model: nn.Module | None = None
) -> Report | None:
    """gptcore's kernels in transformers' OPT; see :func:`apply_gptcore_to_gpt2`."""
    return _apply(
        "opt", model, rope=False, layer_norm=layer_norm, fused_linear_cross_entropy=fused_linear_cross_entropy
    )


def apply_gptcore_to_bloom(
    gelu: bool = True,
    layer_norm: bool = True,
    fused_linear_cross_entropy: bool = True,
    model: nn.Module | None = None,
) -> Report | None:
    """gptcore's kernels in transformers' BLOOM; see :func:`apply_gptcore_to_gpt2`."""
    return _apply(
        "bloom", model, rope=False, gelu=gelu, layer_norm=layer_norm,
        fused_linear_cross_entropy=fused_linear_cross_entropy,
    )  # fmt: skip


def apply_gptcore_to_gpt_neox(
    rope: bool = True,
    gelu: bool = True,
    layer_norm: bool = True,
    fused_linear_cross_entropy: bool = True,
    model: nn.Module | None = None,
) -> Report | None:
    """gptcore's kernels in transformers' GPT-NeoX; see :func:`apply_gptcore_to_llama`."""
    return _apply(
        "gpt_neox", model, rope=rope, gelu=gelu, layer_norm=layer_norm,
        fused_linear_cross_entropy=fused_linear_cross_entropy,
    )  # fmt: skip


def _llama_like(name: str) -> Any:
    def apply(
        rope: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        fused_linear_cross_entropy: bool = True,
        model: nn.Module | None = None,
    ) -> Report | None:
        return _apply(
            name, model, rope=rope, rms_norm=rms_norm, swiglu=swiglu,
            fused_linear_cross_entropy=fused_linear_cross_entropy,
        )  # fmt: skip

    apply.__name__ = apply.__qualname__ = f"apply_gptcore_to_{name}"
    apply.__doc__ = f"""gptcore's kernels in transformers' {name}.

    Args:
        rope: the family's ``apply_rotary_pos_emb``, for all its models, live ones too.
        rms_norm, swiglu: the norms; the gated feed-forwards, whatever their activation.
        fused_linear_cross_entropy: in training with labels the loss comes without logits (the output's are None);
            ``forward(..., skip_logits=False)`` asks for them.
        model: a live model to swap; default every one of the family that is built from now on.

    Returns:
        With ``model``, what was swapped. ``gptcore.restore(model)`` undoes it, ``unapply()`` stops it for new ones.
    """
    return apply


apply_gptcore_to_llama = _llama_like("llama")
apply_gptcore_to_qwen2 = _llama_like("qwen2")
apply_gptcore_to_qwen3 = _llama_like("qwen3")
apply_gptcore_to_mistral = _llama_like("mistral")
apply_gptcore_to_gemma2 = _llama_like("gemma2")
apply_gptcore_to_gemma3 = _llama_like("gemma3")
apply_gptcore_to_mixtral = _llama_like("mixtral")
