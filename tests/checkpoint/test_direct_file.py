"""Files past the page cache: the same bytes where the file system takes direct writes, half of them, or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.checkpoint.direct_file import AT_ONCE, BLOCK, DirectFile, blocks
from tests.checkpoint.checkpoint_cases import assert_same

DIRECT = getattr(os, "O_DIRECT", 0)


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    room = blocks(nbytes)
    generator = torch.Generator().manual_seed(seed)
    return room.copy_(torch.randint(0, 256, (len(room),), dtype=torch.uint8, generator=generator))


def written(path: Path, data: torch.Tensor, size: int, cut: int) -> bytes:
    """``data`` in two writes, the first of ``cut`` bytes."""
    with DirectFile(path) as file:
        file.write(data[:cut])
        file.write(data[cut:])
        file.finish(size)
    return path.read_bytes()


def test_memory_is_of_whole_blocks() -> None:
    for nbytes in (0, 1, BLOCK, BLOCK + 1, 5_000_000):
        room = blocks(nbytes)
        assert room.data_ptr() % BLOCK == 0 and len(room) % BLOCK == 0
        assert nbytes <= len(room) < nbytes + BLOCK


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, AT_ONCE + 3 * BLOCK + 7])
def test_the_file_is_what_was_written(tmp_path: Path, size: int) -> None:
    data = noise(size)
    assert written(tmp_path / "file", data, size, len(data) // BLOCK // 2 * BLOCK) == bytes(
        data.numpy()[:size]
    )


def test_a_file_that_is_there_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.skipif(not DIRECT, reason="a system without O_DIRECT")
@pytest.mark.parametrize("refused", ["open", "first write", "second write", "part of a block"])
def test_file_systems_that_take_no_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """tmpfs refuses to open so, others to write; some take a part of what they are given."""
    open_file, write, calls = os.open, os.write, [0]
    direct: list[bool] = []

    def opens(path: Any, flags: int, *rest: Any) -> int:
        if refused == "open" and flags & DIRECT:
            os.close(open_file(path, flags & ~DIRECT, *rest))
            raise OSError(errno.EINVAL, "no direct writes")
        return open_file(path, flags, *rest)

    def writes(descriptor: int, data: memoryview) -> int:
        import fcntl

        calls[0] += 1
        direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT))
        if direct[-1] and refused == ("first write", "second write", "")[min(calls[0], 3) - 1]:
            raise OSError(errno.EINVAL, "not aligned as this disk would have it")
        if direct[-1] and refused == "part of a block" and calls[0] == 2:
            data = bytes(data[:1000])  # which a direct write may not be
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
            done = write(descriptor, data)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
            return done
        return write(descriptor, data)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "write", writes)
    size = 2 * AT_ONCE + 3 * BLOCK + 11
    data = noise(size)
    assert written(tmp_path / "file", data, size, AT_ONCE) == bytes(data.numpy()[:size])
    assert not direct[-1], "and then without"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_other_errors_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(descriptor: int, data: memoryview) -> int:
        raise OSError(error, os.strerror(error))

    with DirectFile(tmp_path / "file") as file:
        monkeypatch.setattr(os, "write", refuse)
        with pytest.raises(OSError, match=os.strerror(error)):
            file.write(noise(BLOCK))


def test_checkpoints_of_several_writes_come_back(tmp_path: Path) -> None:
    """Tensors that end anywhere, in more bytes than go at once, by either way of saving."""
    generator = torch.Generator().manual_seed(1)
    want = {
        f"w{size}": torch.randn(size, generator=generator)
        for size in (1, 1000, 1_000_003, 2_500_001, 700_000)
    }
    want["strided"] = torch.randn(700, 1000, generator=generator).T
    want["halves"] = torch.randn(999_999, generator=generator).bfloat16()
    assert sum(tensor.nbytes for tensor in want.values()) > 2 * AT_ONCE
    checkpoint.save(tmp_path, 1, want, {})
    with checkpoint.Writer(tmp_path) as writer:
        writer.begin(2, want, {})
    one, two = (checkpoint.open(checkpoint.path_of(tmp_path, step)) for step in (1, 2))
    assert one.manifest.tensors == two.manifest.tensors
    assert_same(checkpoint.load(one.path)[0], want)
    assert_same(checkpoint.load(two.path)[0], want)
