"""Takes a finished checkpoint away."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from gptcore.checkpoint.directory import hidden_path, path_of


def discard(directory: str | os.PathLike[str], step: int) -> None:
    """Delete the checkpoint of ``step``, if there is one, in one step: a reader finds all of it or nothing."""
    hidden = hidden_path(Path(directory), step, secrets.token_hex(8))
    with contextlib.suppress(FileNotFoundError):
        path_of(directory, step).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)  # what is left is a leftover to clean()
