"""One save on its way to the disk: every rank writes its shard, rank 0 waits for all, then publishes.

No collective: ranks tell each other by files in the attempt's hidden directory, so that all of it may run in a thread
beside training. A rank is done when its ``part-r.json`` is there, which it writes after its shard is synced; it has
failed when its ``failed-r`` is there, an empty file, for which a full disk still has room.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcore.checkpoint.direct_file import DirectFile
from gptcore.checkpoint.directory import discard, hidden_path, path_of, publish, steps
from gptcore.checkpoint.manifest import MANIFEST, CheckpointError, Manifest, Part, merge, versions
from gptcore.checkpoint.shard import Shard, Snapshot

_POLL = 0.01  # seconds between two looks for the other ranks' files: nothing beside a write and a sync
_HURRIED = 10.0  # the most patience, in seconds, of one whose run has ended: another rank may be why


class SilentRankError(CheckpointError):
    """Another rank has written nothing of its part for too long; finished checkpoints are intact."""


class FailedElsewhere(Exception):
    """Another rank's failure ended this rank's part; that rank's sentence says why."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints outlive a new one: the last ``last``, it included, all whose step ``every`` divides, and those
    of the steps ``spared``."""

    last: int = 3
    every: int = 0
    spared: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Attempt:
    """What the ranks of one save agree on.

    ``name``: 16 hexadecimal digits. ``patience``: seconds without a byte from any rank, after which rank 0 gives up;
    ``hurried``, set from another thread, cuts it short.
    """

    directory: Path
    step: int
    name: str
    ranks: int
    keep: Keep
    patience: float
    hurried: threading.Event = field(default_factory=threading.Event)

    @property
    def hidden(self) -> Path:
        return hidden_path(self.directory, self.step, self.name)

    @property
    def final(self) -> Path:
        return path_of(self.directory, self.step)

    def write(self, shard: Shard, snapshot: Snapshot | None, state: Mapping[str, Any]) -> None:
        """This rank's work, rank 0's publication included. ``state`` is rank 0's.

        Raises:
            FailedElsewhere: on rank 0, when another rank failed.
            CheckpointError: on rank 0, when the ranks' pieces do not make whole tensors.
        SilentRankError: on rank 0.
            OSError: from the disk.
        """
        part = self._write_shard(shard, snapshot)
        _write_synced(self._part(shard.index), part.to_bytes())
        if shard.index == 0:
            self._publish(self._collect(), state)

    def mark_failed(self, shard: Shard) -> None:
        """Tell rank 0 that this rank has failed, having made room on a full disk."""
        with contextlib.suppress(OSError):
            (self.hidden / shard.file).unlink(missing_ok=True)
            (self.hidden / f"failed-{shard.index:05d}").touch()

    def explain(self, shard: Shard, error: OSError) -> str:
        """The sentence for what the disk refused to this rank."""
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(p for p in (self.directory, *self.directory.absolute().parents) if p.is_dir())
            free = shutil.disk_usage(existing).free
            reason = f"no space left ({shard.nbytes / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"
        where = f"rank {shard.index} of {self.ranks}: " if self.ranks > 1 else ""
        return self.sentence(where + reason)

    def sentence(self, reason: str) -> str:
        there = steps(self.directory)
        kept = f"the last good one is step {there[-1]}" if there else "there was none before"
        return f"cannot save the checkpoint of step {self.step} to {self.directory}: {reason}; {kept}"

    def _write_shard(self, shard: Shard, snapshot: Snapshot | None) -> Part:
        with DirectFile(self.hidden / shard.file) as file:
            part = shard.write(file, self.name, snapshot)
            file.finish(part.file.nbytes)
        return part

    def _part(self, rank: int) -> Path:
        return self.hidden / f"part-{rank:05d}.json"

    def _collect(self) -> list[Part]:
        """All ranks' parts, once they are there. Gives up when no file grew for ``patience`` seconds."""
        seen, since = 0, time.monotonic()
        for rank in range(self.ranks):
            while not self._part(rank).exists():
                if any(self.hidden.glob("failed-*")):
                    raise FailedElsewhere
                size = self._size()
                if size != seen:
                    seen, since = size, time.monotonic()
                patience = min(self.patience, _HURRIED) if self.hurried.is_set() else self.patience
                if time.monotonic() - since > patience:
                    raise SilentRankError(
                        self.sentence(f"rank {rank} of {self.ranks} wrote nothing for {patience:g} s")
                    )
                time.sleep(_POLL)
        return [Part.from_bytes(self._part(rank).read_bytes()) for rank in range(self.ranks)]

    def _size(self) -> int:
        """Bytes of all files so far."""
        size = 0
        for entry in os.scandir(self.hidden):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                size += entry.stat().st_size
        return size

    def _publish(self, parts: list[Part], state: Mapping[str, Any]) -> None:
        try:
            tensors = merge(parts)
        except CheckpointError as error:
            raise CheckpointError(self.sentence(str(error))) from error
        files = tuple(part.file for part in parts)
        manifest = Manifest(self.name, dict(state), versions(), files, tensors)
        _write_synced(self.hidden / MANIFEST, manifest.to_bytes())
        for rank in range(self.ranks):
            self._part(rank).unlink()
        publish(self.hidden, self.final)
        self._prune()

    def _prune(self) -> None:
        """Delete what need not be kept of the checkpoints before this one; later ones stay."""
        for old in [step for step in steps(self.directory) if step <= self.step][: -self.keep.last]:
            if old not in self.keep.spared and (not self.keep.every or old % self.keep.every):
                with contextlib.suppress(OSError):  # the new one is safe; the next save tries again
                    discard(self.directory, old)


def _write_synced(path: Path, data: bytes) -> None:
    """Write ``path`` so that who sees it sees all of it, on the disk."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
