"""gptcore under Hugging Face transformers (5.x, the extra ``gptcore[hf]``); importing it patches nothing.

``register()`` makes ``attn_implementation="gptcore"`` known to transformers; ``apply_gptcore_to_<family>()`` puts the
models of a family onto the kernels, ``unapply()`` stops that.
"""

from __future__ import annotations

from gptcore.integrations.huggingface.apply import (
    apply_gptcore_to_bloom,
    apply_gptcore_to_gemma2,
    apply_gptcore_to_gemma3,
    apply_gptcore_to_gpt2,
    apply_gptcore_to_gpt_neox,
    apply_gptcore_to_llama,
    apply_gptcore_to_mistral,
    apply_gptcore_to_mixtral,
    apply_gptcore_to_opt,
    apply_gptcore_to_qwen2,
    apply_gptcore_to_qwen3,
    unapply,
)
from gptcore.integrations.huggingface.attention import ATTENTION_NAME, register

__all__ = [
    "ATTENTION_NAME",
    "apply_gptcore_to_bloom",
    "apply_gptcore_to_gemma2",
    "apply_gptcore_to_gemma3",
    "apply_gptcore_to_gpt2",
    "apply_gptcore_to_gpt_neox",
    "apply_gptcore_to_llama",
    "apply_gptcore_to_mistral",
    "apply_gptcore_to_mixtral",
    "apply_gptcore_to_opt",
    "apply_gptcore_to_qwen2",
    "apply_gptcore_to_qwen3",
    "register",
    "unapply",
]
