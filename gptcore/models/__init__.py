"""Model configurations, presets and the GPT itself.

``GPTConfig``, ``presets`` and ``accounting`` know no torch; ``GPT`` loads it on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gptcore.models.adapter_spec import AdapterSpec
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
    from gptcore.models import accounting, adapters, presets
    from gptcore.models.gpt import GPT, GPTLoss, KeyValueCache
    from gptcore.models.upcycling import upcycle

__all__ = [
    "GPT", "AdapterSpec", "AttentionSpec", "GPTConfig", "GPTLoss", "KeyValueCache", "MlpSpec", "MoESpec", "NormSpec",
    "PositionSpec", "ScalingSpec", "accounting", "adapters", "presets", "upcycle",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("GPT", "GPTLoss", "KeyValueCache"):
        importlib.import_module("gptcore.torch_required")
        return getattr(importlib.import_module("gptcore.models.gpt"), name)
    if name == "upcycle":
        importlib.import_module("gptcore.torch_required")
        return importlib.import_module("gptcore.models.upcycling").upcycle
    if name == "adapters":
        importlib.import_module("gptcore.torch_required")
    if name in ("accounting", "adapters", "presets"):
        return importlib.import_module(f"gptcore.models.{name}")
    raise AttributeError(f"module 'gptcore.models' has no attribute '{name}'")
