"""Accidents while a checkpoint is written (no room, no permission, kill -9): the last good one stays, no leftovers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gptcore import checkpoint
from gptcore.checkpoint import CheckpointError
from tests.checkpoint.checkpoint_cases import ENVIRONMENT, assert_same, make_tensors


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / f".step-00000009.{12345:016x}"
    leftover.mkdir()
    (leftover / "shard-00000-of-00001.safetensors").write_bytes(b"half")
    other = tmp_path / ".step-00000009.notes"
    other.write_text("not ours")
    checkpoint.save(tmp_path, 1, make_tensors(), {})
    assert not leftover.exists() and other.exists()


def test_a_save_in_progress_is_not_a_leftover(tmp_path: Path) -> None:
    import fcntl

    leftover = tmp_path / f".step-00000009.{12345:016x}"
    leftover.mkdir()
    descriptor = os.open(leftover, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert checkpoint.clean(tmp_path) == []
    os.close(descriptor)
    assert checkpoint.clean(tmp_path) == [leftover]


def test_a_kill_between_two_renames_is_mended(tmp_path: Path) -> None:
    """Where directories cannot change places at once, the old one of the same step stands aside for a moment."""
    path = checkpoint.save(tmp_path, 9, make_tensors(), {})
    aside = tmp_path / ".step-00000009.replaced"
    path.rename(aside)
    assert checkpoint.clean(tmp_path) == [] and not aside.exists()
    assert_same(checkpoint.load(tmp_path)[0], make_tensors())
    shutil.copytree(path, aside)
    assert checkpoint.clean(tmp_path) == [aside] and path.exists()


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
    assert os.listdir(tmp_path) == ["step-00000001"]
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
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_the_name_appears_only_after_the_data_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of the system calls: every file is synced before its name means that it is whole."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        calls.append(f"sync {name.rpartition('.')[0] if name.startswith('.step') else name}")
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> Path:
        calls.append(f"rename to {target.name}")
        if target.name == "step-00000001":
            assert_same(checkpoint.load(source)[0], make_tensors())
            assert not target.exists()
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    checkpoint.save(tmp_path / "run", 1, make_tensors(), {})
    assert calls == [
        "sync shard-00000-of-00001.safetensors",
        "sync part-00000.tmp", "rename to part-00000.json",
        "sync manifest.tmp", "rename to manifest.json",
        "sync .step-00000001", "rename to step-00000001", "sync run",
    ]  # fmt: skip


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
