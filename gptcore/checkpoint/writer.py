"""Saves: of one process or of all ranks of a group, at once or beside training."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from gptcore.checkpoint.attempt import Attempt, Keep
from gptcore.checkpoint.direct_file import blocks
from gptcore.checkpoint.directory import clean, make_hidden, path_of
from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.saving import Saving
from gptcore.checkpoint.shard import Owned, Shard, Snapshot
from gptcore.dist import Member, agree


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
        CheckpointError: on all ranks alike: full disk, missing permission, elements that no rank passed or two did. The
            checkpoints that were there are still there.
        SilentRankError: a CheckpointError; on rank 0, where another rank wrote nothing for ``patience`` seconds.
        ValueError: negative step, keep_last < 1, a state that is not JSON, a tensor that cannot be saved.
    """
    writer = Writer(directory, keep_last=keep_last, keep_every=keep_every, member=member, patience=patience)
    writer._save(step, tensors, state)
    return path_of(directory, step)


class Writer:
    """Saves beside training: :meth:`begin` copies the tensors, a thread writes them, :meth:`wait` says how it went.

    Arguments as :func:`save`, and ``asynchronous``: False writes in ``begin``, and keeps no copy. The copy is kept
    between saves; it is as large as this rank's part. As a context manager it waits at the end of the block. Where an
    exception ends the block on a rank of several, this rank's part is written, and rank 0 waits no more than 10 s for a
    rank that writes nothing.

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
        asynchronous: bool = True,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"checkpoint.save: argument 'keep_last': got {keep_last}, expected 1 or more")
        if keep_every < 0:
            raise ValueError(f"checkpoint.save: argument 'keep_every': got {keep_every}, expected 0 or more")
        self._directory = Path(directory)
        self._keep = Keep(keep_last, keep_every)
        self._member = member if member is not None and member.ranks > 1 else None
        self._patience = patience
        self._asynchronous = asynchronous
        self._room = blocks(0)
        self._saving: Saving | None = None

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Owned],
        state: Mapping[str, Any],
        *,
        spared: Collection[int] = (),
    ) -> None:
        """Copy the tensors and start writing them. Waits for the save before, whose failure it raises.

        ``spared``: steps of checkpoints that this save does not delete, whatever ``keep_last`` says.

        Every rank calls it. Raises as :func:`save` does for what is wrong with the arguments.
        """
        self.wait()
        saving = self._start(step, tensors, state, spared)
        if self._asynchronous:
            try:
                saving.run_in_thread(self._snapshot(saving))
            except Exception as error:  # no memory, no thread: for the others as if the disk were full
                saving.fail(error)
        else:
            saving.run_at_once()
        self._saving = saving

    @property
    def ended(self) -> bool:
        """Whether this rank's part of a save is through, well or not, and nobody has called ``wait`` since."""
        return self._saving is not None and not self._saving.running

    def wait(self) -> Path | None:
        """The path of the checkpoint begun last, now on the disk; None where none was begun since the last wait.

        Every rank calls it. Raises :class:`CheckpointError` as :func:`save` does.
        """
        saving, self._saving = self._saving, None
        return None if saving is None else saving.finish()

    def _save(self, step: int, tensors: Mapping[str, Owned], state: Mapping[str, Any]) -> None:
        saving = self._start(step, tensors, state, ())
        saving.run_at_once()
        saving.finish()

    def _start(
        self, step: int, tensors: Mapping[str, Owned], state: Mapping[str, Any], spared: Collection[int]
    ) -> Saving:
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
        saving.attempt = self._attempt(step, number, ranks, replace(self._keep, spared=frozenset(spared)))
        return saving

    def _prepared(
        self,
        step: int,
        tensors: Mapping[str, Owned],
        state: Mapping[str, Any],
        rank: int,
        ranks: int,
        number: int,
    ) -> Saving:
        if step < 0:
            raise ValueError(f"checkpoint.save: argument 'step': got {step}, expected 0 or more")
        shard = Shard(tensors, rank, ranks)
        attempt = self._attempt(step, number, ranks, self._keep)
        saving = Saving(attempt, shard, _as_json({**state, "step": step}), self._member)
        if rank == 0:
            try:
                clean(self._directory)
                saving.lock = make_hidden(self._directory, step, attempt.name)
            except OSError as error:
                raise CheckpointError(attempt.explain(shard, error)) from error
        return saving

    def _attempt(self, step: int, number: int, ranks: int, keep: Keep) -> Attempt:
        return Attempt(self._directory, step, f"{number:016x}", ranks, keep, self._patience)

    def _snapshot(self, saving: Saving) -> Snapshot:
        shard = saving.shard
        if self._room.numel() < shard.size or (shard.on_cuda and not self._room.is_pinned()):
            self._room = blocks(0)  # gone before the new one comes
            self._room = blocks(shard.size, pinned=shard.on_cuda)
        return shard.snapshot(self._room, saving.attempt.name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._member is None:
            self.wait()
        elif self._saving is not None:  # the other ranks may be anywhere: no collective now
            self._saving.hurry()


def _as_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, which the caller may go on changing."""
    try:
        return dict(json.loads(json.dumps(state, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint.save: argument 'state': not JSON: {error}") from error
