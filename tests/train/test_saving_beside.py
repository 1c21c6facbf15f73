"""Checkpoints written while training goes on: what they hold, when they count, and what becomes of a failed one."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.checkpoint.shard import Shard
from gptcore.train import from_table, run
from gptcore.train.metrics import read

from .toy import Batch, Toy, ToyLoader, settings, train

MINUTE = 60.0


class Watched(ToyLoader):
    """Calls ``before(batch)`` when a batch is asked for."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.before = before

    def batch_at(self, step: int) -> Batch:
        self.before(step)
        return super().batch_at(step)


def wait_for_writer() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(MINUTE)


def test_updates_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is held up until three more updates are done; the checkpoint is of the step at which it was begun."""
    go_on, real = threading.Event(), Shard.write
    there: list[list[int]] = []

    def held_up(shard: Shard, *arguments: Any) -> Any:
        assert go_on.wait(MINUTE)
        return real(shard, *arguments)

    def before(batch: int) -> None:
        there.append(checkpoint.steps(tmp_path / "run" / "checkpoints"))
        if batch == 8:
            go_on.set()

    train(settings(tmp_path / "straight", steps=5))
    monkeypatch.setattr(Shard, "write", held_up)
    table = settings(tmp_path / "run", steps=10, evaluation={"every": 0})
    run(from_table(table), model=Toy(), loader=Watched(before), measure_peak=False, quiet=True)
    assert there[:9] == [[]] * 9
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5, 10]
    want, _ = checkpoint.load(tmp_path / "straight" / "checkpoints")
    got, _ = checkpoint.load(checkpoint.path_of(tmp_path / "run" / "checkpoints", 5))
    weights = [name for name in want if name.startswith(("model/", "optimizer/"))]
    assert weights and all(torch.equal(got[name], want[name]) for name in weights)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_so_many_stay_beside_the_newest(tmp_path: Path, asynchronous: bool) -> None:
    kept = {"every": 5, "keep_last": 2, "keep_every": 15, "asynchronous": asynchronous}
    train(settings(tmp_path, checkpoint=kept))
    assert checkpoint.steps(tmp_path / "checkpoints") == [15, 30, 35, 40]
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]


def test_both_ways_of_saving_give_the_same_files(tmp_path: Path) -> None:
    for asynchronous in (True, False):
        train(settings(tmp_path / str(asynchronous), checkpoint={"asynchronous": asynchronous}))
    (one, _), (two, _) = (checkpoint.load(tmp_path / name / "checkpoints") for name in ("True", "False"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_full_disk_is_said_at_the_next_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the next checkpoint, which may be hours away; what was there stays."""
    real, full = os.fsync, threading.Event()

    def fsync(descriptor: int) -> None:
        if full.is_set() and threading.current_thread().name == "checkpoint":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    def before(batch: int) -> None:
        if batch == 10:  # the checkpoint of step 10 is on its way
            wait_for_writer()
        if batch == 9:
            wait_for_writer()
            full.set()

    monkeypatch.setattr(os, "fsync", fsync)
    table = settings(tmp_path, checkpoint={"every": 10, "keep_last": 1}, evaluation={"every": 0})
    train({**table, "steps": 5})
    with pytest.raises(checkpoint.CheckpointError, match="step 10 .*no space left.*last good one is step 5"):
        run(from_table(table), model=Toy(), loader=Watched(before), measure_peak=False, quiet=True)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000005"]
    assert read(tmp_path / "metrics.jsonl")[-1]["step"] == 11
