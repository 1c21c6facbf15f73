"""Checkpoints that survive kill -9, a full disk and a flipped bit: see :mod:`gptcore.checkpoint.files`."""

from __future__ import annotations

from gptcore.checkpoint.files import (
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

__all__ = [
    "CheckpointError",
    "Loaded",
    "clean",
    "latest",
    "load",
    "load_latest",
    "model_tensors",
    "path_of",
    "read_state",
    "save",
    "steps",
]
