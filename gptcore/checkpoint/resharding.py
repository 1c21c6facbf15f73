"""A checkpoint of one number of files made from another, or from tensors that need not be in memory at once."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gptcore.checkpoint.attempt import Attempt, Keep
from gptcore.checkpoint.directory import clean, make_hidden
from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.reader import Checkpoint
from gptcore.checkpoint.shard import Deferred, Shard

_KEEP_ALL = Keep(last=1 << 62)


def reshard(
    path: str | os.PathLike[str],
    shards: int,
    directory: str | os.PathLike[str] | None = None,
    *,
    only: str | tuple[str, ...] = "",
    done: Callable[[int], None] | None = None,
) -> Path:
    """Write the checkpoint at ``path`` anew as ``shards`` files of equal size, and return the new one's path.

    Every checksum is verified before anything is written. No more than 64 MiB of it are in memory at a time.

    Args:
        directory: of checkpoints; None: where ``path`` lies, where it takes the place of the old one in one step.
        only: tensors whose name begins with it, or with one of them; the rest is left out.
        done: told the bytes of each tensor once it is verified, and again once it is written.

    Raises:
        CheckpointError: a damaged checkpoint; a full disk and the like. What was there is still there.
        ValueError: ``shards`` < 1.
    """
    if shards < 1:
        raise ValueError(f"checkpoint.reshard: argument 'shards': got {shards}, expected 1 or more")
    opened = Checkpoint(path)
    opened.verify([])
    names = [name for name in opened.names if name.startswith(only)]
    for name in names:
        opened.verify([name])
        if done is not None:
            done(opened.nbytes(name))
    wholes = {name: _deferred(opened, name, done) for name in names}
    target = opened.path.parent if directory is None else Path(directory)
    return save_deferred(target, opened.step, wholes, opened.state, shards)


def save_deferred(
    directory: str | os.PathLike[str],
    step: int,
    wholes: Mapping[str, Deferred],
    state: Mapping[str, Any],
    shards: int,
) -> Path:
    """Write a checkpoint of tensors that are read as they are written, one after the other, in this process.

    Arguments and errors as :func:`gptcore.checkpoint.save`; no older checkpoint is deleted.
    """
    directory = Path(directory)
    parts = [Shard.deferred(pieces, index, shards) for index, pieces in enumerate(divide(wholes, shards))]
    attempt = Attempt(directory, step, f"{secrets.randbits(63):016x}", shards, _KEEP_ALL, patience=0.0)
    shard = parts[0]
    try:
        clean(directory)
        held = make_hidden(directory, step, attempt.name)
        try:
            for shard in reversed(parts):  # the first one publishes
                attempt.write(shard, None, {**state, "step": step})
        finally:
            os.close(held)
            shutil.rmtree(attempt.hidden, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(attempt.explain(shard, error)) from error
    return attempt.final


def divide(
    wholes: Mapping[str, Deferred], shards: int
) -> list[list[tuple[str, int, Sequence[int], Deferred]]]:
    """Pieces for each of ``shards`` files, as even in bytes as elements allow: the tensors in a row, cut."""
    total = sum(whole.numel() * whole.dtype.itemsize for whole in wholes.values())
    found: list[list[tuple[str, int, Sequence[int], Deferred]]] = [[] for _ in range(shards)]
    before = 0
    for name, whole in wholes.items():
        width = whole.dtype.itemsize
        bounds = [-(-(total * i // shards - before) // width) for i in range(shards + 1)]
        bounds = [min(max(bound, 0), whole.numel()) for bound in bounds]
        bounds[-1] = whole.numel()
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start < stop or (index == 0 and not whole.numel()):
                found[index].append((name, start, whole.shape, _part(whole, start, stop)))
        before += whole.numel() * width
    return found


def _part(whole: Deferred, start: int, stop: int) -> Deferred:
    return Deferred(whole.dtype, (stop - start,), lambda i, j: whole.read(start + i, start + j))


def _deferred(opened: Checkpoint, name: str, done: Callable[[int], None] | None) -> Deferred:
    def read(start: int, stop: int) -> torch.Tensor:
        found = opened.read(name, start, stop)
        if done is not None:
            done(found.nbytes)
        return found

    return Deferred(opened.dtype(name), opened.shape(name), read)
