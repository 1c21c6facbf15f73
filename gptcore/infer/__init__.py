"""Generation: the KV cache, sampling, the loop that turns a prompt into text, rollouts for reinforcement learning."""

from __future__ import annotations

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.infer.engine import Generation, Timing, generate, generate_batch
from gptcore.infer.kv_cache import KVCache
from gptcore.infer.paged_cache import PagedKVCache, PagePool
from gptcore.infer.rollout import Kept, Rollouts, rollout
from gptcore.infer.sampling import SamplingParams
from gptcore.infer.trained import load

__all__ = [
    "Generation", "KVCache", "Kept", "PagePool", "PagedKVCache", "Rollouts", "SamplingParams", "Timing", "generate",
    "generate_batch", "load", "rollout",
]  # fmt: skip
