"""Checkpoints that survive kill -9, a full disk and a flipped bit, of one process or many: see docs/checkpoints.md.

``from_hf`` and ``to_hf`` exchange models with Hugging Face: see :mod:`gptcore.checkpoint.huggingface`; ``from_peft``
and ``to_peft`` adapters with its PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.checkpoint.attempt import SilentRankError
from gptcore.checkpoint.directory import clean, discard, is_checkpoint, path_of, steps
from gptcore.checkpoint.exporting import to_safetensors
from gptcore.checkpoint.huggingface import from_hf, to_hf
from gptcore.checkpoint.loading import (
    MODEL_PREFIX,
    Loaded,
    latest,
    load,
    load_latest,
    model_tensors,
    read_state,
)
from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.peft import from_peft, to_peft
from gptcore.checkpoint.reader import Checkpoint
from gptcore.checkpoint.resharding import reshard
from gptcore.checkpoint.shard import Slice
from gptcore.checkpoint.writer import Writer, save

if TYPE_CHECKING:
    from gptcore.checkpoint.torch_distributed import from_dcp, to_dcp

open = Checkpoint  # checkpoint.open(path) reads as what it does

__all__ = [
    "MODEL_PREFIX", "Checkpoint", "CheckpointError", "Loaded", "SilentRankError", "Slice", "Writer", "clean", "discard",
    "from_dcp", "from_hf", "from_peft", "is_checkpoint", "latest", "load", "load_latest", "model_tensors", "open",
    "path_of", "read_state", "reshard", "save", "steps", "to_dcp", "to_hf", "to_peft", "to_safetensors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("from_dcp", "to_dcp"):  # torch.distributed.checkpoint takes long to import
        from gptcore.checkpoint import torch_distributed

        return getattr(torch_distributed, name)
    raise AttributeError(f"module 'gptcore.checkpoint' has no attribute '{name}'")
