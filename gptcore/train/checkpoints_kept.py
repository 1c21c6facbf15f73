"""Which checkpoints a run keeps to go back to, and which it goes back to."""

from __future__ import annotations

import sys
from pathlib import Path

from gptcore import checkpoint
from gptcore.train.config import TrainConfig


def anchor_spacing(config: TrainConfig) -> int:
    """The distance of checkpoints kept for going back, 0 where the last ones reach back far enough anyway.

    Of those, a multiple of ``checkpoint.every``, the last two are kept: one is always ``rewind_steps`` old.
    """
    every, reach = config.checkpoint.every, config.recovery.rewind_steps
    if not (config.recovery.rewinds and every) or every * (config.checkpoint.keep_last - 1) >= reach:
        return 0
    return -(-reach // every) * every


def spared(directory: Path, step: int, config: TrainConfig) -> list[int]:
    """The two checkpoints to go back to once that of ``step`` is there, which ``keep_last`` may not delete."""
    spacing = anchor_spacing(config)
    if not spacing:
        return []
    there = {*(earlier for earlier in checkpoint.steps(directory) if earlier < step), step}
    return sorted(each for each in there if each % spacing == 0)[-2:]


def before(directory: Path, onset: int, distance: int) -> Path | None:
    """The newest good checkpoint at least ``distance`` before the update of index ``onset``.

    Else the oldest that does not hold that update; None where each does.
    """
    there = [step for step in checkpoint.steps(directory) if step <= onset]
    far = [step for step in there if step <= onset - distance]
    for step in [*reversed(far), *there[len(far) :]]:
        path = checkpoint.path_of(directory, step)
        try:
            checkpoint.Checkpoint(path).verify()
            return path
        except checkpoint.CheckpointError as error:
            print(f"gptcore: {error}; looking for another to go back to", file=sys.stderr, flush=True)
    return None


def discard_after(directory: Path, step: int) -> None:
    """Delete the checkpoints beyond ``step``, the newest first: a kill leaves a run that comes to it again."""
    for newer in reversed(checkpoint.steps(directory)):
        if newer > step:
            checkpoint.discard(directory, newer)
