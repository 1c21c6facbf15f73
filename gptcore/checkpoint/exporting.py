"""Weights of a checkpoint as one plain safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from gptcore.checkpoint.loading import MODEL_PREFIX
from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.reader import Checkpoint
from gptcore.checkpoint.safetensors_file import stream_safetensors
from gptcore.data.atomic import atomic_file


def to_safetensors(
    path: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    prefix: str = MODEL_PREFIX,
    done: Callable[[int], None] | None = None,
) -> Path:
    """Write the tensors whose name begins with ``prefix`` of the checkpoint at ``path`` to ``file``, verified.

    Names lose the prefix. Tied weights are there once; the other names are in the file's metadata under ``tied``, as
    JSON, beside ``step``. One tensor is in memory at a time. ``done`` is told the bytes of each tensor.

    Raises:
        CheckpointError: a damaged checkpoint, or none of its tensors has the prefix.
        UserError: a full disk and the like; an older ``file`` is unchanged then.
    """
    opened = Checkpoint(path)
    opened.verify([])
    names = {name[len(prefix) :]: name for name in opened.names if name.startswith(prefix)}
    if not names:
        raise CheckpointError(f"checkpoint {path} holds no tensor under '{prefix}'")
    layout = {short: (opened.dtype(name), opened.shape(name)) for short, name in names.items()}
    metadata = {"format": "pt", "step": str(opened.step), "tied": json.dumps(opened.state.get("tied", {}))}

    def read(short: str) -> Iterator[Tensor]:
        yield opened.read(names[short])
        if done is not None:
            done(opened.nbytes(names[short]))

    with atomic_file(file) as stream:
        stream_safetensors(stream, layout, read, metadata)
    return Path(file)
