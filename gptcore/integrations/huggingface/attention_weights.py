"""Calls that ask for the weights of attention, which no kernel makes: transformers' eager attention computes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import output_capturing


def eager_if_wanted(module: torch.nn.Module, options: dict[str, Any]) -> Callable[..., Any] | None:
    """The family's own attention function where the caller records weights.

    Most families are told so by ``output_attentions``; GPT-2's and OPT's layers are not, and a hook collects them.
    """
    wanted = options.get("output_attentions")
    if not wanted and not torch.compiler.is_compiling():
        collector = getattr(output_capturing, "_active_collector", None)
        wanted = collector is not None and "attentions" in (collector.get() or ())
    if not wanted:
        return None
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def additive_mask(mask: Tensor | None, query: Tensor, keys: int, causal: bool, left: int) -> Tensor | None:
    """What eager attention adds to the scores, for a mask or its absence as ``attention_forward`` has them."""
    if mask is None:
        if not causal:
            return None
        mask = torch.ones(query.shape[2], keys, dtype=torch.bool, device=query.device).tril()
        mask = (mask if left < 0 else mask.triu(-left))[None, None]
    mask = mask[..., :keys]
    if mask.dtype != torch.bool:
        return mask
    hidden = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return hidden.masked_fill(~mask, torch.finfo(query.dtype).min)
