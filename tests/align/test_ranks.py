"""Alignment on two processes is alignment on one: the cases of ``rank_cases.py``, and whole runs under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore import checkpoint
from gptcore.align.shares import Shares
from gptcore.cli.main import main
from gptcore.dist import Member
from gptcore.train.config import ParallelSpec
from gptcore.train.metrics import read
from tests.align.supervised_cases import base_run
from tests.dist.processes import cases_of, shared_verdicts

MODULES = ("tests.align.rank_cases",)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return shared_verdicts(MODULES, 2, tmp_path_factory, limit=200.0)


@pytest.mark.parametrize("name", cases_of(MODULES))
def test_two_processes_give_what_one_gives(found: dict[str, list[str]], name: str) -> None:
    failed = {rank: text for rank, text in enumerate(found[name]) if text}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 4), st.sampled_from([0, 2]))
def test_leaves_cover_an_update_once_and_keep_to_their_bound(
    lengths: list[int], ranks: int, zero: int
) -> None:
    sizes = np.array(lengths, np.int32)
    of_ranks = [
        Shares(Member(None, rank, ranks), ParallelSpec(zero=zero)).leaves(sizes, 50) for rank in range(ranks)
    ]
    assert len({len(leaves) for leaves in of_ranks}) == 1
    leaves = sorted(leaf for of_rank in of_ranks for leaf in of_rank)
    assert [leaf.number for leaf in leaves] == list(range(len(leaves)))
    counted = np.concatenate([leaf.rows for leaf in leaves if leaf.weight])
    assert counted.tolist() == list(range(len(lengths)))
    assert all(len(leaf.rows) == 1 or sizes[leaf.rows].sum() <= 50 for leaf in leaves)
    idle = sum(leaf.weight == 0.0 for leaf in leaves)  # only where there are more leaves than responses
    assert idle == max(0, len(leaves) - len(lengths)) < ranks


@given(st.integers(1, 50), st.integers(1, 8))
def test_every_prompt_is_asked_by_one_process(count: int, ranks: int) -> None:
    parts = [Shares(Member(None, rank, ranks), ParallelSpec()) for rank in range(ranks)]
    if count >= ranks:
        asked = [list(part.prompts(count)) for part in parts]
        assert [prompt for part in asked for prompt in part] == list(range(count))
        assert max(map(len, asked)) - min(map(len, asked)) <= 1


# --- whole runs ---------------------------------------------------------------------------------------------------

CLOCKS = ("seconds", "episodes_per_s", "time")


def lines(run: Path) -> list[dict[str, Any]]:
    """Its metrics without what a clock says."""
    return [
        {k: v for k, v in line.items() if not any(c in k for c in CLOCKS)}
        for line in read(run / "metrics.jsonl")
    ]


def words(start: Path, tasks: Path, judge: Path, out: Path, steps: int) -> list[str]:
    settings = {
        "ppo.episodes": 8, "ppo.minibatch": 4, "ppo.epochs": 2, "ppo.max_new_tokens": 4, "ppo.grain": 2,
        "ppo.kl_target": 0.5, "ppo.ema_decay": 0.9, "evaluation.every": 1, "checkpoint.every": 1,
        "optimizer.lr": 1e-3, "tasks.held_out": 3,
    }  # fmt: skip
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [
        "ppo", str(start), str(tasks), "--reward", f"{judge}:score", "--out", str(out), "--steps", str(steps),
        "--quiet", *pairs,
    ]  # fmt: skip


def test_ppo_under_torchrun_is_one_process_s_run_bit_for_bit(tmp_path: Path) -> None:
    """Two processes at ZeRO stage 1 to the second iteration, one process from there on; and one process throughout."""
    start = base_run(tmp_path / "start")
    tasks, judge = tmp_path / "tasks.jsonl", tmp_path / "judge.py"
    tasks.write_text("".join(json.dumps({"prompt": f"{i}+1=", "truth": str(i + 1)}) + "\n" for i in range(9)))
    judge.write_text("def score(task, text):\n    return sum(map(ord, text)) % 17 / 17\n")
    assert main(words(start, tasks, judge, tmp_path / "one", 3)) == 0
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "gptcore",
    ]
    shared = words(start, tasks, judge, tmp_path / "two", 2)
    done = subprocess.run(
        [*run, *shared, "--zero", "1"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("iteration 2: reward") == 1
    two = lines(tmp_path / "two")
    assert two == lines(tmp_path / "one")[: len(two)] and two[-1]["step"] == 2
    of_second = [line for line in lines(tmp_path / "two" / "ranks" / "1") if line["kind"] == "train"]
    assert of_second == [line for line in two if line["kind"] == "train"]
    assert main(words(start, tasks, judge, tmp_path / "two", 3)) == 0
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    for part in (".", "average"):
        one, other = (
            checkpoint.load(checkpoint.path_of(tmp_path / name / part / "checkpoints", 3))[0]
            for name in ("one", "two")
        )
        assert one.keys() == other.keys()
        assert [name for name, value in one.items() if not torch.equal(other[name], value)] == []
