"""Model configurations, presets and the GPT itself.

``GPTConfig``, ``presets`` and ``accounting`` know no torch; ``GPT`` loads it on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gptcore.models.config import (
    AttentionSpec,
    GPTConfig,
    MlpSpec,
    MoESpec,
    NormSpec,
    PositionSpec,
    ScalingSpec,
)

if TYPE_CHECKING:
    from gptcore.models import accounting, presets
    from gptcore.models.gpt import GPT, GPTLoss, KeyValueCache
    from gptcore.models.upcycling import upcycle

__all__ = [
    "GPT", "AttentionSpec", "GPTConfig", "GPTLoss", "KeyValueCache", "MlpSpec", "MoESpec", "NormSpec",
    "PositionSpec", "ScalingSpec", "accounting", "presets", "upcycle",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("GPT", "GPTLoss", "KeyValueCache"):
        importlib.import_module("gptcore.torch_required")
        return getattr(importlib.import_module("gptcore.models.gpt"), name)
    if name == "upcycle":
        importlib.import_module("gptcore.torch_required")
        return importlib.import_module("gptcore.models.upcycling").upcycle
    if name in ("accounting", "presets"):
        return importlib.import_module(f"gptcore.models.{name}")
    raise AttributeError(f"module 'gptcore.models' has no attribute '{name}'")
