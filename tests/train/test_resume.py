"""A run that is killed, stopped or starved at any moment and then resumed ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gptcore
from gptcore import checkpoint
from gptcore.train.metrics import read

from .toy import TINY_GPT, settings, train

PROGRAM = Path(__file__).with_name("toy.py")
# The package under test, installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gptcore.__file__).parents[1])}


def start(table: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), json.dumps(table)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_for_step(directory: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the metrics file shows ``step``; fails when the process ends or takes a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = read(directory / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError(f"step {step} not reached in a minute")


def assert_same_end(a: Path, b: Path) -> None:
    """Same weights, moments, masters, generators, and the same training losses line by line."""
    (left, left_state), (right, right_state) = (checkpoint.load(path / "checkpoints") for path in (a, b))
    assert left_state["step"] == right_state["step"]
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    lines = [
        [(m["kind"], m["step"], m.get("loss"), m.get("grad_norm"), m.get("val_loss")) for m in read(p)]
        for p in (a / "metrics.jsonl", b / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


def kill_and_resume(tmp_path: Path, kills: int, *, slack: int = 300, **changes: Any) -> None:
    """Kills once in every 60 updates; ``slack`` more keep the last kill too from coming after the end."""
    random.seed(20)
    steps = 60 * kills + slack
    table = {"steps": steps, "checkpoint": {"every": 7, "keep_last": 2}, **changes}
    train(settings(tmp_path / "straight", **table))
    killed = settings(tmp_path / "killed", **table)
    for kill in range(kills):
        process = start(killed)
        wait_for_step(tmp_path / "killed", 60 * kill + random.randrange(5, 50), process)
        time.sleep(random.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = start(killed)
    errors = done.communicate()[1]
    assert done.returncode == 0, errors
    assert "resuming" in errors and "falling back" not in errors
    assert_same_end(tmp_path / "straight", tmp_path / "killed")
    assert not [name for name in os.listdir(tmp_path / "killed" / "checkpoints") if name.startswith(".")]


def test_kill_and_resume_is_bitwise(tmp_path: Path) -> None:
    """The toy has dropout, so the generators must come back too."""
    kill_and_resume(tmp_path, 2, data={"accumulate": 2})


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_kills_and_resume_is_bitwise(tmp_path: Path, dtype: str) -> None:
    kill_and_resume(tmp_path, 10, dtype=dtype, data={"accumulate": 2})


# PaLM's blocks and its optimizer, at the smallest.
PALM = {
    "model": {
        **TINY_GPT, "dropout": 0.1, "norm": {"parallel": "shared"}, "position": {"kind": "rotary"},
        "attention": {"num_heads": 2, "num_kv_heads": 1}, "mlp": {"activation": "swiglu", "bias": False},
    },
    "optimizer": {"name": "adafactor", "variant": "palm"},
    "schedule": {"name": "palm"},
    "z_loss": 1e-4,
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restart_reproduces_the_next_two_thousand_updates(tmp_path: Path, dtype: str) -> None:
    """PaLM's determinism (Chowdhery et al. 2022, section 5): restarted from update 15,000, its 15,000 to 17,000 came
    out bit for bit. Here from 1,000 to 3,000, in another process and on another number of threads."""
    table = {
        **PALM,
        "dtype": dtype,
        "steps": 3000,
        "checkpoint": {"every": 1000, "keep_last": 3},
        "threads": 2,
    }
    train(settings(tmp_path / "straight", **table))
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "straight", again)
    for step in (3000, 2000):
        checkpoint.discard(again / "checkpoints", step)
    process = start(settings(again, **{**table, "threads": 1}))
    errors = process.communicate()[1]
    assert process.returncode == 0 and "at step 1000" in errors, errors
    assert_same_end(tmp_path / "straight", again)
    losses = [line["loss"] for line in read(again / "metrics.jsonl") if line["kind"] == "train"]
    assert len(losses) == 3000 and len(set(losses[1000:])) > 1900 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_and_tells_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    table = settings(tmp_path / "stopped", steps=400, checkpoint={"every": 0}, evaluation={"every": 0})
    process = start(table)
    wait_for_step(tmp_path / "stopped", 20, process)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    saved = checkpoint.steps(tmp_path / "stopped" / "checkpoints")
    assert len(saved) == 1 and 20 <= saved[0] < 400
    assert f"after step {saved[0]}, checkpoint saved" in errors and "resume with: python" in errors
    assert "Traceback" not in errors
    train(table)
    train({**table, "run_dir": str(tmp_path / "straight")})
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")


def test_killed_before_the_first_checkpoint_starts_afresh(tmp_path: Path) -> None:
    """Metrics of the lost attempt, its evaluation of step 0 included, must not appear twice."""
    table = settings(tmp_path / "killed", checkpoint={"every": 0})
    (tmp_path / "killed").mkdir()
    lost = [{"kind": "evaluation", "step": 0, "val_loss": 9.0}, {"kind": "train", "step": 1, "loss": 9.0}]
    text = "".join(json.dumps(line) + "\n" for line in lost) + '{"kind": "tr'
    (tmp_path / "killed" / "metrics.jsonl").write_text(text)
    train(table)
    train({**table, "run_dir": str(tmp_path / "straight")})
    assert_same_end(tmp_path / "straight", tmp_path / "killed")


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_no_room_for_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    """A file-size limit below a checkpoint's size, as a full disk would be; the older one stays good."""
    table = settings(tmp_path, evaluation={"every": 0})
    train({**table, "steps": 5})
    there = tmp_path / "checkpoints" / "step-00000005"
    kept = {path.name: path.read_bytes() for path in there.iterdir()}
    command = [
        sys.executable,
        "-c",
        LIMITED,
        str(sum(map(len, kept.values())) // 2),
        str(PROGRAM),
        json.dumps(table),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "cannot save the checkpoint of step 10" in done.stderr and "step 5" in done.stderr
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000005"]
    assert {path.name: path.read_bytes() for path in there.iterdir()} == kept
