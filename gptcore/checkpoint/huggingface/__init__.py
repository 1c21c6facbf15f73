"""Checkpoints in Hugging Face's format, to and from ``gptcore.models.GPT``: config.json and safetensors.

transformers itself is not needed. :func:`from_hf` reads what it, or the hub, holds; :func:`to_hf` writes what its
``from_pretrained`` loads. ``configuration`` translates config.json, ``layout`` names and shapes of the weights,
``files`` reads and writes them.
"""

from __future__ import annotations

from gptcore.checkpoint.huggingface.configuration import FAMILIES, family_of, read_config, write_config
from gptcore.checkpoint.huggingface.files import (
    TOKENIZER_FILES,
    copy_tokenizer,
    directory_of,
    from_hf,
    from_hf_classifier,
    to_hf,
)

__all__ = [
    "FAMILIES", "TOKENIZER_FILES", "copy_tokenizer", "directory_of", "family_of", "from_hf", "from_hf_classifier",
    "read_config", "to_hf", "write_config",
]  # fmt: skip
