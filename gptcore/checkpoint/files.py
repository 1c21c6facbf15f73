"""One checkpoint is one safetensors file: tensors, checksums and a JSON state in its header.

One file means one ``rename``, so a reader sees either all of a checkpoint or nothing of it. The life
of a save: write to a temporary name in the same directory, fsync the file, rename it into place,
fsync the directory, and only then delete what is older than the last ``keep_last``. Whatever kills
the process in between, the newest finished checkpoint is still there.

Layout of the header's ``__metadata__`` (all strings, as the format demands):

- ``format``: ``gptcore-checkpoint-1``;
- ``state``: the caller's state with ``step``, as JSON;
- ``sha256``: JSON, name → digest over the tensor's dtype, shape and bytes;
- ``state_sha256``: digest over ``state``, ``sha256`` and nothing else.

So a flip anywhere, in the data, the header or the state, is found when the file is read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptcore.checkpoint.safetensors_file import write_safetensors
from gptcore.errors import UserError

if TYPE_CHECKING:
    import torch

FORMAT = "gptcore-checkpoint-1"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.\d+\.tmp")
MODEL_PREFIX = "model/"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or does not hold what it held when it was written."""


class Loaded(NamedTuple):
    """A verified checkpoint: its file, its tensors by name, its JSON state (with ``step``)."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def path_of(directory: str | os.PathLike[str], step: int) -> Path:
    """The file of the checkpoint taken after ``step`` updates."""
    return Path(directory) / f"step-{step:08d}.safetensors"


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """Steps of the finished checkpoints in ``directory``, ascending; empty if there is no directory."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def save(
    directory: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep_last: int = 3,
) -> Path:
    """Write a checkpoint atomically and return its path.

    Args:
        directory: created if absent. Holds nothing else than checkpoints.
        step: updates done so far, >= 0. A checkpoint of the same step is replaced.
        tensors: by name, any dtype that safetensors has (bf16 included), any device, any strides.
        state: must be JSON without NaN or infinity. ``step`` is added to it.
        keep_last: how many checkpoints up to and including this one stay, >= 1. Later ones, which exist
            when a run went back to an older checkpoint, are never touched.

    Raises:
        CheckpointError: full disk, missing permission and the like. The checkpoints that were there
            are still there.
        ValueError: negative step, keep_last < 1, a state that is not JSON.
    """
    if step < 0:
        raise ValueError(f"checkpoint.save: argument 'step': got {step}, expected 0 or more")
    if keep_last < 1:
        raise ValueError(f"checkpoint.save: argument 'keep_last': got {keep_last}, expected 1 or more")
    directory = Path(directory)
    ready = {name: _plain(tensor) for name, tensor in tensors.items()}
    metadata = _metadata(ready, {**state, "step": step})
    final = path_of(directory, step)
    temporary = directory / f".step-{step:08d}.{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        clean(directory)
        _write_and_rename(temporary, final, ready, metadata)
    except OSError as error:
        raise CheckpointError(_write_failure(directory, step, ready, error)) from error
    _prune(directory, step, keep_last)
    return final


def load(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of one checkpoint file, every checksum verified.

    A directory means its newest good checkpoint.

    Raises:
        CheckpointError: not there, truncated, corrupt, or not a checkpoint; names the file.
    """
    path = Path(path)
    if path.is_dir():
        found = load_latest(path)
        if found is None:
            raise CheckpointError(f"no checkpoint in {path}")
        return found.tensors, found.state
    metadata, state = _read_header(path)
    digests = _json(path, metadata, "sha256")
    tensors = dict(_read_tensors(path))
    if tensors.keys() != digests.keys():
        raise CheckpointError(f"checkpoint {path} is corrupt: its tensors are not those that were saved")
    for name, tensor in tensors.items():
        if _digest(tensor) != digests[name]:
            raise CheckpointError(f"checkpoint {path} is corrupt: tensor '{name}' fails its checksum")
    return tensors, state


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Only the JSON state of a checkpoint file, verified, without reading the tensors."""
    return _read_header(Path(path))[1]


def load_latest(
    directory: str | os.PathLike[str], *, warn: Callable[[str], None] | None = None
) -> Loaded | None:
    """The newest good checkpoint of ``directory``, or None if it holds no checkpoint at all.

    Corrupt ones are passed over, newest first, and each is reported through ``warn`` (default: a line
    on stderr).

    Raises:
        CheckpointError: there are checkpoints but none is good. Starting afresh is the user's decision.
    """
    say = warn or _say
    bad: list[str] = []
    for step in reversed(steps(directory)):
        path = path_of(directory, step)
        try:
            tensors, state = load(path)
        except CheckpointError as error:
            bad.append(str(error))
            continue
        for sentence in bad:
            say(f"{sentence}; falling back to step {step}")
        return Loaded(path, tensors, state)
    if bad:
        raise CheckpointError(f"no good checkpoint in {directory}: {'; '.join(bad)}")
    return None


def latest(directory: str | os.PathLike[str], *, warn: Callable[[str], None] | None = None) -> Path | None:
    """Path of the newest checkpoint that passes its checksums; as :func:`load_latest` otherwise."""
    found = load_latest(directory, warn=warn)
    return found.path if found else None


def clean(directory: str | os.PathLike[str]) -> list[Path]:
    """Delete temporary files that killed saves left behind; returns what was deleted.

    A save in progress holds a lock on its temporary file, which the kernel drops with the process, so
    neither a recycled process id nor a second writer confuses this.
    """
    deleted = []
    for path in sorted(Path(directory).iterdir()) if Path(directory).is_dir() else []:
        if not _TEMPORARY.fullmatch(path.name):
            continue
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            continue  # in use, or already gone
        deleted.append(path)
    return deleted


def model_tensors(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's state dict out of a training checkpoint, tied weights under all their names."""
    found = {name[len(MODEL_PREFIX) :]: t for name, t in tensors.items() if name.startswith(MODEL_PREFIX)}
    for alias, name in state.get("tied", {}).items():
        found[alias] = found[name]
    return found


def _write_and_rename(
    temporary: Path, final: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    with open(temporary, "xb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            write_safetensors(file, tensors, metadata)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _fsync_directory(final.parent)


def _fsync_directory(directory: Path) -> None:
    """Make a rename durable: without this the new name may be lost in a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, step: int, keep_last: int) -> None:
    for old in [s for s in steps(directory) if s <= step][:-keep_last]:
        path_of(directory, old).unlink(missing_ok=True)


def _write_failure(directory: Path, step: int, tensors: Mapping[str, torch.Tensor], error: OSError) -> str:
    size = sum(tensor.nbytes for tensor in tensors.values())
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(place for place in (directory, *directory.absolute().parents) if place.is_dir())
        free = shutil.disk_usage(existing).free
        reason = f"no space left ({size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"
    there = steps(directory)
    kept = f"the last good one is step {there[-1]}" if there else "there was none before"
    return f"cannot save the checkpoint of step {step} to {directory}: {reason}; {kept}"


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()


def _metadata(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint.save: argument 'state': not JSON: {error}") from error
    digests = json.dumps({name: _digest(tensor) for name, tensor in tensors.items()})
    return {"format": FORMAT, "state": text, "sha256": digests, "state_sha256": _text_digest(text, digests)}


def _text_digest(state: str, digests: str) -> str:
    return hashlib.sha256(f"{len(state)}\n{state}\n{digests}".encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes (about 2 GB/s with the processor's SHA instructions)."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and verified state of a checkpoint file."""
    from safetensors import SafetensorError, safe_open

    import gptcore.torch_required  # noqa: F401 - safetensors' own sentence would not say why

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or corrupt: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}")
    if _text_digest(metadata.get("state", ""), metadata.get("sha256", "")) != metadata.get("state_sha256"):
        raise CheckpointError(f"checkpoint {path} is corrupt: its state fails its checksum")
    return metadata, _json(path, metadata, "state")


def _json(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(metadata[key]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is corrupt: unreadable '{key}'") from error


def _read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                # A copy: a tensor on the mapped file would fault when somebody truncates it later.
                yield name, file.get_tensor(name).clone()
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or corrupt: {error}") from error


def _say(sentence: str) -> None:
    print(f"gptcore: {sentence}", file=sys.stderr, flush=True)
