"""Interchange with torch.distributed.checkpoint (DCP), bit for bit, one tensor in memory at a time.

A name's parts between slashes become nested dictionaries there: ``model/h.0.weight`` is ``state_dict["model"]
["h.0.weight"]``, which DCP calls ``model.h.0.weight``. The JSON state is a string under ``state``.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.reader import Checkpoint
from gptcore.checkpoint.resharding import save_deferred
from gptcore.checkpoint.shard import Deferred
from gptcore.data.atomic import atomic_directory

_STATE = "state"  # our JSON state over there
_OBJECTS = "objects"  # in our state: what is no tensor over there


def to_dcp(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    only: str | tuple[str, ...] = "",
    done: Callable[[int], None] | None = None,
) -> Path:
    """Write the checkpoint at ``path`` as a DCP checkpoint into ``directory``, which must be empty or absent.

    ``only``: tensors whose name begins with it. ``done`` is told the bytes of each tensor once it is written.

    Raises:
        CheckpointError: a damaged checkpoint.
        UserError: a directory that is not empty, a full disk; it does not appear then.
    """
    opened = Checkpoint(path)
    opened.verify([])
    nested: dict[str, Any] = {_STATE: json.dumps(opened.state)}
    names = [name for name in opened.names if name.startswith(only)]
    for name in names:
        _put(nested, name, torch.empty(opened.shape(name), dtype=opened.dtype(name), device="meta"))
    planner = _ReadingPlanner(opened, {name.replace("/", "."): name for name in names}, done)
    with atomic_directory(directory) as place:
        # A file per tensor: a file of several is held in memory until it is written.
        writer = dcp.FileSystemWriter(place, single_file_per_rank=False, thread_count=1)
        with _alone():
            dcp.save(nested, storage_writer=writer, planner=planner, no_dist=True)
    return Path(directory)


def from_dcp(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    shards: int = 1,
    done: Callable[[int], None] | None = None,
) -> Path:
    """Write a DCP checkpoint, of :func:`to_dcp` or of any other program, as one of ours, and return its path.

    What is no tensor there (numbers, strings) comes into ``state["objects"]`` by its name.

    DCP's metadata is a pickle, which may run code when it is read: only take checkpoints that you trust.

    Args:
        source: the DCP directory.
        directory: of checkpoints, into which ``step-...`` is written.
        step: of the checkpoint; None: that of :func:`to_dcp`'s.
        shards: files to write.
        done: told the bytes of each tensor once it is read.

    Raises:
        CheckpointError: no DCP checkpoint there, one without a step, an object that is not JSON; a full disk.
    """
    reader = dcp.FileSystemReader(source)
    try:
        metadata = reader.read_metadata()
    except OSError as error:
        raise CheckpointError(f"no torch.distributed.checkpoint at {source}: {error.strerror}") from error
    tensors = _OneTensor(reader, done)
    wholes, objects = {}, {}
    for key, entry in metadata.state_dict_metadata.items():
        name = "/".join(map(str, (metadata.planner_data or {}).get(key, (key,))))
        if isinstance(entry, TensorStorageMetadata):
            wholes[name] = tensors.deferred(key, entry)
        else:
            objects[name] = _object(reader, key)
    state = _state_of(source, objects, step)
    return save_deferred(directory, state["step"], wholes, state, shards)


def _state_of(source: str | os.PathLike[str], objects: dict[str, Any], step: int | None) -> dict[str, Any]:
    text = objects.pop(_STATE, None)
    try:
        state = dict(json.loads(text)) if isinstance(text, str) else {}
        if objects:
            state[_OBJECTS] = json.loads(json.dumps(objects, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source} holds an object that is not JSON: {error}") from error
    state["step"] = state.get("step") if step is None else step
    if not isinstance(state["step"], int):
        raise CheckpointError(f"{source} does not say which step it is of; name it")
    return state


def _put(nested: dict[str, Any], name: str, tensor: Tensor) -> None:
    *outer, last = name.split("/")
    for part in outer:
        found = nested.setdefault(part, {})
        nested = found if isinstance(found, dict) else {last: found}
    if last in nested:
        raise CheckpointError(
            f"'{name}' is a tensor and also holds others, which has no place in nested dictionaries"
        )
    nested[last] = tensor


class _ReadingPlanner(DefaultSavePlanner):
    """Plans by tensors on meta, and reads each when it is written."""

    def __init__(
        self, opened: Checkpoint, names: Mapping[str, str], done: Callable[[int], None] | None
    ) -> None:
        super().__init__()
        self._opened, self._names, self._done = opened, names, done

    def lookup_object(self, index: MetadataIndex) -> Any:
        name = self._names.get(index.fqn)
        if name is None:
            return super().lookup_object(index)
        if self._done is not None:
            self._done(self._opened.nbytes(name))
        return self._opened.read(name)


class _NoCode(DefaultLoadPlanner):
    """Loads what is no tensor without running what is pickled in it."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _load(reader: dcp.FileSystemReader, state_dict: dict[str, Any]) -> None:
    planner = _NoCode(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _alone():
        dcp.load(state_dict, storage_reader=reader, planner=planner, no_dist=True)


@contextmanager
def _alone() -> Iterator[None]:
    """DCP in one process: without its warning that it is one, and with errors as they arose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise error.failures[0][0] from None


def _object(reader: dcp.FileSystemReader, key: str) -> Any:
    holder: dict[str, Any] = {key: None}
    _load(reader, holder)
    return holder[key]


class _OneTensor:
    """Reads tensors by their keys over there, and holds the last one."""

    def __init__(self, reader: dcp.FileSystemReader, done: Callable[[int], None] | None) -> None:
        self._reader, self._done = reader, done
        self._held: dict[str, Tensor] = {}

    def deferred(self, key: str, entry: TensorStorageMetadata) -> Deferred:
        def read(start: int, stop: int) -> Tensor:
            if key not in self._held:
                self._held = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
                _load(self._reader, self._held)
            if self._done is not None:
                self._done((stop - start) * entry.properties.dtype.itemsize)
            return self._held[key].view(-1)[start:stop]

        return Deferred(entry.properties.dtype, tuple(entry.size), read)
