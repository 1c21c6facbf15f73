"""gptcore under Hugging Face transformers (5.x, the extra ``gptcore[hf]``).

``register()`` makes ``attn_implementation="gptcore"`` known to transformers; nothing is patched by importing.
"""

from __future__ import annotations

from gptcore.integrations.huggingface.attention import ATTENTION_NAME, register

__all__ = ["ATTENTION_NAME", "register"]
