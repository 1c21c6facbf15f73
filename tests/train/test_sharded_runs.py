"""Whole runs over several processes: other numbers of ranks and stages when resumed, and ranks that are killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.dist import Member
from gptcore.train.processes import LostRankError, naming_lost_ranks
from tests.ranks import finish
from tests.train.sharded_program import settings, start

# A rank that has lost another says so and ends within this; promised are 30 s.
PATIENCE = 30.0


def whole(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.path_of(run_dir / "checkpoints", step))[0]


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


def completed(ranks: int, table: dict[str, Any]) -> None:
    for code, text in finish(start(ranks, table)):
        assert code == 0, text


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight updates of one process without a stop."""
    path = tmp_path_factory.mktemp("straight")
    completed(1, settings(path))
    yield path


def test_saved_on_four_ranks_resumed_on_any(straight: Path, tmp_path: Path) -> None:
    """Stage 3 on 4 ranks to the middle; on from there on 1, 2 and 3 ranks at other stages, with one process's bits."""
    first = tmp_path / "first"
    completed(4, settings(first, steps=4, parallel={"zero": 3}))
    same(whole(first, 4), whole(straight, 4))
    for ranks, stage in ((1, 0), (2, 1), (3, 2)):
        path = tmp_path / f"{ranks}-ranks"
        shutil.copytree(first, path)
        completed(ranks, settings(path, parallel={"zero": stage}))
        same(whole(path, 8), whole(straight, 8))


@pytest.mark.long
def test_a_hundred_updates_after_a_change_of_ranks(tmp_path: Path) -> None:
    table = {"steps": 110, "checkpoint": {"every": 10, "keep_last": 20}}
    straight, first = tmp_path / "straight", tmp_path / "first"
    completed(1, settings(straight, **table))
    completed(4, settings(first, **{**table, "steps": 10}, parallel={"zero": 3}))
    for ranks in (1, 2, 3):
        for stage in range(4):
            path = tmp_path / f"{ranks}-{stage}"
            shutil.copytree(first, path)
            completed(ranks, settings(path, **table, parallel={"zero": stage}))
            same(whole(path, 110), whole(straight, 110))


def kill_and_resume(path: Path, straight: Path, seed: int) -> None:
    """Kill one rank, or all, at a random moment; what is left stops with a sentence, and a restart ends in one
    process's bits."""
    chance = random.Random(seed)
    table = settings(path, parallel={"zero": chance.randint(0, 3)})
    processes = start(2, table)
    while not (path / "metrics.jsonl").exists() and processes[0].poll() is None:
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.6))
    victims = chance.choice([processes[:1], processes[1:], processes])
    for process in victims:
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    for process, (code, text) in zip(processes, finish(processes), strict=True):
        if process in victims:
            assert code in (-signal.SIGKILL, 0)
        elif code:
            assert code == 2 and "another process of the run ended or went silent" in text, text
    assert time.monotonic() - began < PATIENCE
    there = checkpoint.steps(path / "checkpoints")
    completed(2, table)
    assert set(there) - {8} <= set(range(0, 8, 2))
    same(whole(path, 8), whole(straight, 8))


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_moment(straight: Path, tmp_path: Path, seed: int) -> None:
    kill_and_resume(tmp_path / "run", straight, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5, 50))
def test_killed_at_more_random_moments(straight: Path, tmp_path: Path, seed: int) -> None:
    kill_and_resume(tmp_path / "run", straight, seed)


def test_a_lost_rank_is_one_error_wherever_it_shows(tmp_path: Path) -> None:
    two = Member(None, 0, 2)
    for sign in (
        RuntimeError("Connection closed by peer"),
        checkpoint.SilentRankError("rank 1 wrote nothing"),
    ):
        with (
            pytest.raises(
                LostRankError, match=rf"another process of the run ended or went silent \({sign}\)"
            ),
            naming_lost_ranks(two, tmp_path),
        ):
            raise sign
    for other in (RuntimeError("shapes differ"), checkpoint.CheckpointError("no space left")):
        with pytest.raises(type(other), match=str(other)), naming_lost_ranks(two, tmp_path):
            raise other


def test_ranks_that_do_not_divide_the_leaves_are_refused(tmp_path: Path) -> None:
    for code, text in finish(start(2, settings(tmp_path, data={"accumulate": 3}))):
        assert code == 2 and "3 leaves of 1 sequences, which 2 processes do not divide" in text, text
    assert not os.listdir(tmp_path / "checkpoints") if (tmp_path / "checkpoints").exists() else True
