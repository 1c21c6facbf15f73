"""The directory that holds a run's checkpoints: their names, publication, deletion, and what killed saves leave.

A checkpoint is made in a hidden directory beside the others and takes its name in one rename, so a reader sees all of
it or nothing. Whoever fills a hidden directory holds a lock on it, which the kernel drops with the process: neither a
recycled process id nor a second writer makes a save in progress look like a leftover.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from gptcore.checkpoint.manifest import MANIFEST
from gptcore.data.atomic import exchange, sync_directory

_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.step-\d{8,}\.[0-9a-f]{16}")
_ASIDE = re.compile(r"\.(step-\d{8,})\.replaced")  # where the file system cannot exchange two directories


def path_of(directory: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint taken after ``step`` updates lies."""
    return Path(directory) / f"step-{step:08d}"


def hidden_path(directory: Path, step: int, attempt: str) -> Path:
    """Where it is made; ``attempt``: 16 hexadecimal digits that no other save has."""
    return directory / f".step-{step:08d}.{attempt}"


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is one checkpoint, finished or damaged, rather than a directory of them or something else."""
    path = Path(path)
    return (path / MANIFEST).is_file() or (_NAME.fullmatch(path.name) is not None and path.is_dir())


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """Steps of the finished checkpoints in ``directory``, ascending; empty if there is no directory."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def make_hidden(directory: Path, step: int, attempt: str) -> int:
    """Make the directory of an attempt and lock it; the lock lives until the returned descriptor is closed."""
    path = hidden_path(directory, step, attempt)
    while True:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = lock(path)
        if path.is_dir():
            return descriptor
        os.close(descriptor)  # between the two somebody took it for a leftover


def lock(path: Path) -> int:
    """Share the lock on an attempt's directory until the returned descriptor is closed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a file system without locks, where clean deletes nothing either
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def publish(hidden: Path, final: Path) -> None:
    """Give a finished checkpoint its name; one of that name gives way to it in the same step. Durable on return."""
    sync_directory(hidden)
    if final.exists():
        exchange(hidden, final)
        sync_directory(final.parent)
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        hidden.rename(final)
        sync_directory(final.parent)


def discard(directory: str | os.PathLike[str], step: int) -> None:
    """Delete the checkpoint of ``step``, if there is one, in one step: a reader finds all of it or nothing."""
    hidden = hidden_path(Path(directory), step, secrets.token_hex(8))
    with contextlib.suppress(FileNotFoundError):
        path_of(directory, step).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)  # what is left is a leftover to clean()


def clean(directory: str | os.PathLike[str]) -> list[Path]:
    """Delete what killed saves and deletions left behind; returns what was deleted.

    A save in progress, of whatever process, stays.
    """
    directory = Path(directory)
    deleted = []
    for path in _leftovers(directory):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # already gone
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
            deleted.append(path)
        except OSError:
            continue  # in use, or without permission
        finally:
            os.close(descriptor)
    return deleted


def _leftovers(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        aside = _ASIDE.fullmatch(path.name)
        if aside and not (directory / aside[1]).exists():  # killed between the two renames
            path.rename(directory / aside[1])
        elif aside or _HIDDEN.fullmatch(path.name):
            yield path
