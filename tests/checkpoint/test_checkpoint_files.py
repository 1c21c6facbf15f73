"""Checkpoints: what was saved comes back bit for bit, and no accident destroys the last good one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import gptcore
from gptcore import checkpoint
from gptcore.checkpoint import CheckpointError

# The package under test, installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gptcore.__file__).parents[1])}
STATE = {"model": {"layers": 2}, "loss": 0.1 + 0.2, "text": "Grüße", "none": None}


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(7, 5, generator=generator)
    return {
        "model/weight": base,
        "model/bf16": torch.randn(33, generator=generator).bfloat16(),
        "model/strided": torch.randn(6, 8, generator=generator)[:, ::2],
        "optimizer/step": torch.tensor(3),
        "optimizer/f64": torch.randn(2, 3, 4, generator=generator, dtype=torch.float64),
        "rng": torch.randint(0, 256, (17,), generator=generator, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "flags": torch.tensor([True, False]),
    }


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor))
        assert torch.equal(left, right), name


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "a" / "b", 12, make_tensors(), STATE)
    tensors, state = checkpoint.load(path)
    assert_same(tensors, make_tensors())
    assert state == {**STATE, "step": 12}
    assert checkpoint.read_state(path) == state


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert_same(load_file(checkpoint.save(tmp_path, 1, make_tensors(), {})), make_tensors())


def test_nothing_but_the_checkpoint_is_left(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, make_tensors(), {})
    assert os.listdir(tmp_path) == ["step-00000005.safetensors"]


def test_keep_last(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, make_tensors(step), {}, keep_last=2)
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_pruning_spares_the_one_just_saved_and_later_ones(tmp_path: Path) -> None:
    """After falling back from a corrupt step 30, step 20 must not be deleted in favour of 30."""
    for step in (10, 30):
        checkpoint.save(tmp_path, step, make_tensors(step), {}, keep_last=5)
    checkpoint.save(tmp_path, 20, make_tensors(20), {}, keep_last=1)
    assert checkpoint.steps(tmp_path) == [20, 30]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, make_tensors(1), {"n": 1})
    path = checkpoint.save(tmp_path, 3, make_tensors(2), {"n": 2})
    tensors, state = checkpoint.load(path)
    assert_same(tensors, make_tensors(2))
    assert state["n"] == 2


def test_latest_of_nothing(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "step-00000001.safetensors")


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """One bit in each of 150 places over header, state and data: none may pass."""
    path = checkpoint.save(tmp_path, 1, make_tensors(), STATE)
    good = path.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 150)):
        flip_bit(path, position)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
        path.write_bytes(good)
    checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_truncation_is_found(tmp_path: Path, keep: float) -> None:
    path = checkpoint.save(tmp_path, 1, make_tensors(), STATE)
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(CheckpointError, match="step-00000001"):
        checkpoint.load(path)


def test_foreign_safetensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_latest_falls_back_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, make_tensors(step), {})
    flip_bit(checkpoint.path_of(tmp_path, 3), -1)
    os.truncate(checkpoint.path_of(tmp_path, 2), 50)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, warn=said.append) == checkpoint.path_of(tmp_path, 1)
    assert len(said) == 2 and all("falling back to step 1" in line for line in said)
    assert "step-00000003" in said[0] and "step-00000002" in said[1]


def test_latest_default_warning_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, make_tensors(step), {})
    os.truncate(checkpoint.path_of(tmp_path, 2), 50)
    assert checkpoint.latest(tmp_path) == checkpoint.path_of(tmp_path, 1)
    assert "falling back to step 1" in capsys.readouterr().err


def test_all_corrupt_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    os.truncate(checkpoint.save(tmp_path, 1, make_tensors(), {}), 50)
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        checkpoint.latest(tmp_path)


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-00000009.12345.tmp"
    leftover.write_bytes(b"half")
    other = tmp_path / "notes.tmp"
    other.write_text("not ours")
    checkpoint.save(tmp_path, 1, make_tensors(), {})
    assert not leftover.exists() and other.exists()


def test_a_save_in_progress_is_not_a_leftover(tmp_path: Path) -> None:
    import fcntl

    leftover = tmp_path / ".step-00000009.12345.tmp"
    with open(leftover, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert checkpoint.clean(tmp_path) == []
    assert checkpoint.clean(tmp_path) == [leftover]


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": object()}])
def test_state_must_be_json(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="state"):
        checkpoint.save(tmp_path, 1, {}, state)
    assert os.listdir(tmp_path) == []


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step"):
        checkpoint.save(tmp_path, -1, {}, {})
    with pytest.raises(ValueError, match="keep_last"):
        checkpoint.save(tmp_path, 1, {}, {}, keep_last=0)
    with pytest.raises(ValueError, match="complex64"):
        checkpoint.save(tmp_path, 1, {"z": torch.zeros(1, dtype=torch.complex64)}, {})
    assert os.listdir(tmp_path) == []


def test_model_tensors_expand_tied_weights(tmp_path: Path) -> None:
    tensors = {"model/embedding.weight": torch.ones(3, 2), "optimizer/x": torch.zeros(1)}
    found = checkpoint.model_tensors(tensors, {"tied": {"head.weight": "embedding.weight"}})
    assert found.keys() == {"embedding.weight", "head.weight"}


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save the checkpoint of step 4"):
        checkpoint.save(tmp_path / "file" / "run", 4, make_tensors(), {})


FULL_DISK = """
    import resource, sys, torch
    from gptcore import checkpoint
    small = {"w": torch.zeros(1000)}
    checkpoint.save(sys.argv[1], 1, small, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoint.save(sys.argv[1], 2, {"w": torch.zeros(100_000)}, {}, keep_last=1)
    except checkpoint.CheckpointError as error:
        print(error)
"""


def test_a_write_that_fails_half_way_keeps_the_old(tmp_path: Path) -> None:
    """A file-size limit stops the write after 100 kB, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)],
        capture_output=True, text=True, check=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.stdout.count("\n") == 1 and "the last good one is step 1" in done.stdout
    assert os.listdir(tmp_path) == ["step-00000001.safetensors"]
    checkpoint.load(checkpoint.path_of(tmp_path, 1))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC on fsync, where a file system with delayed allocation reports it."""
    import errno

    checkpoint.save(tmp_path, 1, make_tensors(), {})

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointError, match=r"no space left \(.* MB needed, .* MB free\).*step 1"):
        checkpoint.save(tmp_path, 2, make_tensors(), {}, keep_last=1)
    assert os.listdir(tmp_path) == ["step-00000001.safetensors"]


def test_the_name_appears_only_after_the_data_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of the system calls: sync the whole file, rename it, sync the directory."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("sync directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        assert_same(checkpoint.load(source)[0], make_tensors())
        assert not target.exists()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint.save(tmp_path, 1, make_tensors(), {})
    assert calls == ["sync file", "rename", "sync directory"]


KILLED = """
    import sys, torch
    from gptcore import checkpoint
    step = 0
    while True:
        step += 1
        checkpoint.save(sys.argv[1], step, {"w": torch.full((300_000,), float(step))}, {}, keep_last=2)
        if step == 3:
            print("ready", flush=True)
"""


def test_kill_during_saves_leaves_a_good_one(tmp_path: Path) -> None:
    """A process that does nothing but save is killed at arbitrary moments."""
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    said: list[str] = []
    path = checkpoint.latest(tmp_path, warn=said.append)
    assert path is not None and not said, "a finished checkpoint is never corrupt"
    tensors, state = checkpoint.load(path)
    assert state["step"] >= 3 and bool((tensors["w"] == state["step"]).all())
    assert json.dumps(state)
