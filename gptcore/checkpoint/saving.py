"""A save under way: one rank's part of it, in a thread or not, and how all ranks' parts ended."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as c10d

from gptcore.checkpoint.attempt import Attempt, FailedElsewhere, SilentRankError
from gptcore.checkpoint.directory import lock
from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.shard import Shard, Snapshot
from gptcore.dist import Member

# By so much nicer than training's threads is the writer's: it takes what they leave, and a little more.
_NICER = 10


class Saving:
    """A save under way: this rank's part of it, and how it ended."""

    def __init__(
        self, attempt: Attempt, shard: Shard, state: Mapping[str, Any], member: Member | None
    ) -> None:
        self.attempt, self.shard, self._state, self._member = attempt, shard, state, member
        self.lock: int | None = None  # of the hidden directory
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self, snapshot: Snapshot | None) -> None:
        try:
            if self.lock is None:
                self.lock = self._join_directory()
            self.attempt.write(self.shard, snapshot, self._state)
        except Exception as error:
            self.fail(error)

    def _join_directory(self) -> int:
        try:
            return lock(self.attempt.hidden)
        except FileNotFoundError as error:
            who = f"rank {self.shard.index} of {self.attempt.ranks}"
            reason = f"{who} does not find what rank 0 made there; all ranks must write to one file system"
            raise CheckpointError(self.attempt.sentence(reason)) from error

    def run_at_once(self) -> None:
        """Write from the tensors themselves."""
        try:
            self.run(None)
        except BaseException as error:  # Ctrl-C
            self.fail(error)
            self.abandon()
            raise

    def run_in_thread(self, snapshot: Snapshot) -> None:
        # Not a daemon: a program that ends without waiting ends after the save.
        self._thread = threading.Thread(target=self._run_aside, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def _run_aside(self, snapshot: Snapshot) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + _NICER))
        self.run(snapshot)

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on, while the others do."""
        self._error = error
        self.attempt.mark_failed(self.shard)

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def hurry(self) -> None:
        """Wait for this rank's part, and have rank 0 wait for others no longer than they write."""
        self.attempt.hurried.set()
        self.join()

    def join(self) -> None:
        """Wait for this rank's part."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> Path:
        """Wait for all ranks; the path, or the first rank's error on each of them."""
        self.join()
        own = self._sentence()
        try:
            sentences = self._gather(own)
        except Exception:
            if isinstance(self._error, SilentRankError):
                raise self._error from None
            if own:
                raise CheckpointError(own) from self._error
            raise
        failed = [sentence for sentence in sentences if sentence is not None]
        if failed:
            self.abandon()
            sentence = next(
                filter(None, failed), self.attempt.sentence("a rank failed and could not say why")
            )
            raise CheckpointError(sentence) from self._error
        self._unlock()
        return self.attempt.final

    def abandon(self) -> None:
        """Leave nothing of it; only when all ranks have ended."""
        if self.shard.index == 0:
            shutil.rmtree(self.attempt.hidden, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _sentence(self) -> str | None:
        """What went wrong here; None: nothing, "": another rank knows."""
        if self._error is None or isinstance(self._error, CheckpointError):
            return None if self._error is None else str(self._error)
        if isinstance(self._error, OSError):
            return self.attempt.explain(self.shard, self._error)
        return "" if isinstance(self._error, FailedElsewhere) else self.attempt.sentence(repr(self._error))

    def _gather(self, sentence: str | None) -> list[str | None]:
        if self._member is None:
            return [sentence]
        found: list[str | None] = [None] * self._member.ranks
        c10d.all_gather_object(found, sentence, group=self._member.group)
        return found
