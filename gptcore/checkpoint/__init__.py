"""Checkpoints that survive kill -9, a full disk and a flipped bit: see :mod:`gptcore.checkpoint.files`.

``from_hf`` and ``to_hf`` exchange models with Hugging Face: see :mod:`gptcore.checkpoint.huggingface`.
"""

from __future__ import annotations

from gptcore.checkpoint.files import (
    MODEL_PREFIX,
    CheckpointError,
    Loaded,
    clean,
    latest,
    load,
    load_latest,
    model_tensors,
    path_of,
    read_state,
    save,
    steps,
)
from gptcore.checkpoint.huggingface import from_hf, to_hf

__all__ = [
    "MODEL_PREFIX",
    "CheckpointError",
    "Loaded",
    "clean",
    "from_hf",
    "latest",
    "load",
    "load_latest",
    "model_tensors",
    "path_of",
    "read_state",
    "save",
    "steps",
    "to_hf",
]
