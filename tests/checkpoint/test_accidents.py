"""Accidents while a checkpoint is written (no room, no permission, kill -9): the last good one stays, no leftovers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

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


def kill_savers(place: Path, ranks: int, kills: int, seed: int) -> None:
    script = [
        sys.executable,
        "-m",
        "tests.checkpoint.killed_saves",
        str(place),
        str(ranks),
        str(kills),
        str(seed),
    ]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}  # forked children may not use a pool of threads
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"of {kills} kills" in done.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_lose_nothing_that_was_reported(tmp_path: Path, ranks: int) -> None:
    """Processes that do nothing but save are killed at 5 random moments, two ranks one after the other."""
    kill_savers(tmp_path / "run", ranks, 5, seed=ranks)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_many_kills_lose_nothing_that_was_reported(tmp_path: Path, ranks: int) -> None:
    kill_savers(tmp_path / "run", ranks, 50, seed=10 + ranks)


# write answers "no space left" once this process has written so much to files of that name; or kills the process.
REFUSING_WRITE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
ssize_t write(int file, const void *data, size_t size) {
    static long written;
    static ssize_t (*real)(int, const void *, size_t);
    char link[64], path[4096] = "";
    if (!real) real = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, getenv("REFUSED_NAME"))) {
        written += (long)size;
        if (written > atol(getenv("REFUSED_AFTER"))) {
            if (getenv("REFUSED_BY_DEATH")) kill(getpid(), SIGKILL);
            errno = ENOSPC;
            return -1;
        }
    }
    return real(file, data, size);
}
"""
TWO_RANKS = """
    import sys, torch, torch.distributed as c10d
    from gptcore import checkpoint, dist

    def save_twice(place, rank):
        writer = checkpoint.Writer(place, keep_last=1, member=dist.member_of("test"), patience=3)
        for step in (1, 2):
            writer.begin(step, {f"w{rank}": torch.full((100_000,), float(step))}, {})
            try:
                writer.wait()
            except checkpoint.CheckpointError as error:
                print(error)
                print(type(error).__name__, file=sys.stderr)

    place, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    c10d.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    save_twice(place, rank)
    c10d.destroy_process_group()  # gloo's threads let go of the tensors before the interpreter ends
"""


def two_ranks(tmp_path: Path, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Both ranks of TWO_RANKS, the second one with a ``write`` that refuses its second shard half-way."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile the write that refuses")
    (tmp_path / "refuse.c").write_text(REFUSING_WRITE)
    library = tmp_path / "refuse.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "refuse.c", "-ldl"], check=True)
    refusing = {
        "LD_PRELOAD": str(library), "REFUSED_NAME": "shard-00001-of-00002", "REFUSED_AFTER": "600000", **environment,
    }  # fmt: skip
    places = [str(tmp_path / "run"), str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TWO_RANKS), *places, str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", **(refusing if rank else {})},
        )
        for rank in range(2)
    ]  # fmt: skip
    texts = [rank.communicate(timeout=120) for rank in ranks]
    return [
        subprocess.CompletedProcess([], r.returncode, *text) for r, text in zip(ranks, texts, strict=True)
    ]


def test_a_full_disk_of_one_rank_is_said_by_both(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    said = r"cannot save the checkpoint of step 2 to .*run: rank 1 of 2: no space left \(0.4 MB needed, .* MB free\); "
    assert re.fullmatch(said + r"the last good one is step 1\n", first.stdout), first.stdout
    assert first.stdout == second.stdout
    assert os.listdir(tmp_path / "run") == ["step-00000001"]
    assert_same(checkpoint.load(tmp_path / "run")[0], {f"w{rank}": torch.ones(100_000) for rank in range(2)})


def test_a_rank_that_dies_while_it_writes_is_named(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, REFUSED_BY_DEATH="1")
    assert second.returncode == -signal.SIGKILL
    assert "rank 1 of 2 wrote nothing for 3 s; the last good one is step 1" in first.stdout, first.stderr
    assert "SilentRankError" in first.stderr.split()
    assert_same(checkpoint.load(tmp_path / "run")[0], {f"w{rank}": torch.ones(100_000) for rank in range(2)})
    checkpoint.clean(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["step-00000001"]
