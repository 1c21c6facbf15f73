"""Saves: of one process or of all ranks of a group, at once or beside training."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.checkpoint.attempt import Attempt, FailedElsewhere, Keep
from gptcore.checkpoint.directory import clean, lock, make_hidden, path_of
from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.shard import Owned, Shard
from gptcore.dist import Member, agree

# By so much nicer than training's threads is the writer's: it takes what they leave, and a little more.
_NICER = 10


def save(
    directory: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Owned],
    state: Mapping[str, Any],
    keep_last: int = 3,
    *,
    keep_every: int = 0,
    member: Member | None = None,
    patience: float = 600.0,
) -> Path:
    """Write a checkpoint atomically and return its path, once it is on the disk.

    Args:
        directory: created if absent, the same for all ranks. Holds nothing else than checkpoints.
        step: updates done so far, >= 0. A checkpoint of the same step is replaced.
        tensors: what this rank owns, by name: whole tensors, slices of them, or several slices of one. Any dtype that
            safetensors has (bf16 included), any device, any strides. All ranks together must pass each element of each
            tensor once.
        state: must be JSON without NaN or infinity. ``step`` is added to it. Rank 0's is kept.
        keep_last: how many checkpoints up to and including this one stay, >= 1. Later ones, which exist
            when a run went back to an older checkpoint, are never touched.
        keep_every: checkpoints whose step is a multiple of it stay too; 0: none does.
        member: this process in the group whose ranks all call this; None: one process alone.
        patience: seconds without a new byte from any rank after which rank 0 gives up; longer than a sync takes.

    Raises:
        CheckpointError: on all ranks alike: full disk, missing permission, a rank that is silent, elements that no
            rank passed or two did. The checkpoints that were there are still there.
        ValueError: negative step, keep_last < 1, a state that is not JSON, a tensor that cannot be saved.
    """
    writer = Writer(directory, keep_last=keep_last, keep_every=keep_every, member=member, patience=patience)
    writer._save(step, tensors, state)
    return path_of(directory, step)


class Writer:
    """Saves beside training: :meth:`begin` copies the tensors, a thread writes them, :meth:`wait` says how it went.

    Arguments as :func:`save`. The copy is kept between saves; it is as large as this rank's part. As a context manager
    it waits at the end of the block. Where an exception ends the block on a rank of several, this rank's part is
    written and the other ranks are not waited for.

    A checkpoint is safe when ``wait``, or the next ``begin``, has returned.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every: int = 0,
        member: Member | None = None,
        patience: float = 600.0,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"checkpoint.save: argument 'keep_last': got {keep_last}, expected 1 or more")
        if keep_every < 0:
            raise ValueError(f"checkpoint.save: argument 'keep_every': got {keep_every}, expected 0 or more")
        self._directory = Path(directory)
        self._keep = Keep(keep_last, keep_every)
        self._member = member if member is not None and member.ranks > 1 else None
        self._patience = patience
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._saving: _Saving | None = None

    def begin(self, step: int, tensors: Mapping[str, Owned], state: Mapping[str, Any]) -> None:
        """Copy the tensors and start writing them. Waits for the save before, whose failure it raises.

        Every rank calls it. Raises as :func:`save` does for what is wrong with the arguments.
        """
        self.wait()
        self._saving = saving = self._start(step, tensors, state)
        try:
            saving.run_in_thread(self._snapshot(saving.shard))
        except Exception as error:  # no memory, no thread: for the others as if the disk were full
            saving.fail(error)

    def wait(self) -> Path | None:
        """The path of the checkpoint begun last, now on the disk; None where none was begun since the last wait.

        Every rank calls it. Raises :class:`CheckpointError` as :func:`save` does.
        """
        saving, self._saving = self._saving, None
        return None if saving is None else saving.finish()

    def _save(self, step: int, tensors: Mapping[str, Owned], state: Mapping[str, Any]) -> None:
        saving = self._start(step, tensors, state)
        try:
            saving.run(None)
        except BaseException as error:  # Ctrl-C
            saving.fail(error)
            saving.abandon()
            raise
        saving.finish()

    def _start(self, step: int, tensors: Mapping[str, Owned], state: Mapping[str, Any]) -> _Saving:
        """Check the arguments, make the hidden directory, and agree on all ranks that the save begins."""
        member = self._member
        rank, ranks = (member.rank, member.ranks) if member is not None else (0, 1)
        number = secrets.randbits(63)
        saving, error = None, None
        try:
            saving = self._prepared(step, tensors, state, rank, ranks, number)
        except Exception as caught:
            error = caught
        if member is not None:
            try:
                number = agree("checkpoint.save", member, {"step": step}, [number], error)[0][0]
            except BaseException:
                if saving is not None:
                    saving.abandon()
                raise
        if error is not None:
            raise error
        assert saving is not None
        saving.attempt = self._attempt(step, number, ranks)
        return saving

    def _prepared(
        self,
        step: int,
        tensors: Mapping[str, Owned],
        state: Mapping[str, Any],
        rank: int,
        ranks: int,
        number: int,
    ) -> _Saving:
        if step < 0:
            raise ValueError(f"checkpoint.save: argument 'step': got {step}, expected 0 or more")
        shard = Shard(tensors, rank, ranks)
        attempt = self._attempt(step, number, ranks)
        saving = _Saving(attempt, shard, _as_json({**state, "step": step}), self._member)
        if rank == 0:
            try:
                clean(self._directory)
                saving.lock = make_hidden(self._directory, step, attempt.name)
            except OSError as error:
                raise CheckpointError(attempt.explain(shard, error)) from error
        return saving

    def _attempt(self, step: int, number: int, ranks: int) -> Attempt:
        return Attempt(self._directory, step, f"{number:016x}", ranks, self._keep, self._patience)

    def _snapshot(self, shard: Shard) -> Tensor:
        if self._buffer.numel() < shard.nbytes or (shard.on_cuda and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # gone before the new one comes
            self._buffer = torch.empty(shard.nbytes, dtype=torch.uint8, pin_memory=shard.on_cuda)
        shard.copy_to(self._buffer)
        return self._buffer

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._member is None:
            self.wait()
        elif self._saving is not None:  # the other ranks may be anywhere: no collective now
            self._saving.join()


class _Saving:
    """A save under way: this rank's part of it, and how it ended."""

    def __init__(
        self, attempt: Attempt, shard: Shard, state: Mapping[str, Any], member: Member | None
    ) -> None:
        self.attempt, self.shard, self._state, self._member = attempt, shard, state, member
        self.lock: int | None = None  # of the hidden directory
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self, buffer: Tensor | None) -> None:
        try:
            if self.lock is None:
                self.lock = self._join_directory()
            self.attempt.write(self.shard, buffer, self._state)
        except Exception as error:
            self.fail(error)

    def _join_directory(self) -> int:
        try:
            return lock(self.attempt.hidden)
        except FileNotFoundError as error:
            who = f"rank {self.shard.index} of {self.attempt.ranks}"
            reason = f"{who} does not find what rank 0 made there; all ranks must write to one file system"
            raise CheckpointError(self.attempt.sentence(reason)) from error

    def run_in_thread(self, buffer: Tensor) -> None:
        # Not a daemon: a program that ends without waiting ends after the save.
        self._thread = threading.Thread(target=self._run_aside, args=(buffer,), name="checkpoint")
        self._thread.start()

    def _run_aside(self, buffer: Tensor) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + _NICER))
        self.run(buffer)

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on, while the others do."""
        self._error = error
        self.attempt.mark_failed(self.shard)

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
            if self._error is not None:
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


def _as_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, which the caller may go on changing."""
    try:
        return dict(json.loads(json.dumps(state, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint.save: argument 'state': not JSON: {error}") from error
