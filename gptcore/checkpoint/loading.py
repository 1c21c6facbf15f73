"""Whole checkpoints into memory: one by its path, or the newest good one of a directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from gptcore.checkpoint.directory import is_checkpoint, path_of, steps
from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.reader import Checkpoint

MODEL_PREFIX = "model/"
_T = TypeVar("_T")


class Loaded(NamedTuple):
    """A verified checkpoint: its path, its tensors by name, its JSON state (with ``step``)."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def load(
    path: str | os.PathLike[str], *, only: str | tuple[str, ...] = ""
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU, whole) and state of one checkpoint, every checksum verified.

    Args:
        path: a checkpoint; a directory of checkpoints means its newest good one.
        only: tensors whose name begins with it, or with one of them: "model/" for the weights, "optimizer/",
            "adapter/". What is not read is not verified, except that every file is there in its size.

    Raises:
        CheckpointError: not there, truncated, corrupt, or not a checkpoint; names the file.
    """
    path = Path(path)
    if path.is_dir() and not is_checkpoint(path):
        found = load_latest(path, only=only)
        if found is None:
            raise CheckpointError(f"no checkpoint in {path}")
        return found.tensors, found.state
    opened = Checkpoint(path)
    opened.verify([])
    return opened.read_all([name for name in opened.names if name.startswith(only)]), opened.state


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Only the JSON state of a checkpoint, verified, without reading the tensors."""
    return Checkpoint(path).state


def load_latest(
    directory: str | os.PathLike[str],
    *,
    only: str | tuple[str, ...] = "",
    warn: Callable[[str], None] | None = None,
) -> Loaded | None:
    """The newest good checkpoint of ``directory``, or None if it holds no checkpoint at all.

    Corrupt ones are passed over, newest first, and each is reported through ``warn`` (default: a line
    on stderr). ``only``: as for :func:`load`.

    Raises:
        CheckpointError: there are checkpoints but none is good. Starting afresh is the user's decision.
    """
    return _newest(directory, lambda path: Loaded(path, *load(path, only=only)), warn)


def latest(directory: str | os.PathLike[str], *, warn: Callable[[str], None] | None = None) -> Path | None:
    """Path of the newest checkpoint that passes its checksums; as :func:`load_latest` otherwise."""

    def verified(path: Path) -> Path:
        Checkpoint(path).verify()
        return path

    return _newest(directory, verified, warn)


def model_tensors(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's state dict out of a training checkpoint, tied weights under all their names."""
    found = {name[len(MODEL_PREFIX) :]: t for name, t in tensors.items() if name.startswith(MODEL_PREFIX)}
    for alias, name in state.get("tied", {}).items():
        found[alias] = found[name]
    return found


def _newest(
    directory: str | os.PathLike[str], take: Callable[[Path], _T], warn: Callable[[str], None] | None
) -> _T | None:
    """What ``take`` gives for the newest checkpoint that it does not refuse."""
    say = warn or _say
    bad: list[str] = []
    for step in reversed(steps(directory)):
        try:
            found = take(path_of(directory, step))
        except CheckpointError as error:
            bad.append(str(error))
            continue
        for sentence in bad:
            say(f"{sentence}; falling back to step {step}")
        return found
    if bad:
        raise CheckpointError(f"no good checkpoint in {directory}: {'; '.join(bad)}")
    return None


def _say(sentence: str) -> None:
    print(f"gptcore: {sentence}", file=sys.stderr, flush=True)
