"""to_hf over a directory that holds a model: whatever stops it, what is read back is one of the two, or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.checkpoint import huggingface
from gptcore.data import atomic
from gptcore.errors import UserError
from gptcore.models import GPT, presets

KILLED = 17
# What changes the disk. In the child of a fork the process ends before the n-th call.
STEPS = ("replace", "rename", "unlink", "link", "mkdir", "rmdir", "fsync", "open")


def _model(heads: int) -> GPT:
    """Weights of one shape whatever the heads: a configuration that meets the others' weights computes nonsense."""
    sizes = {"num_layers": 1, "width": 24, "vocab_size": 30, "attention": {"num_heads": heads}}
    torch.manual_seed(heads)
    return GPT(presets.get("gpt2", sizes))


def _write(model: GPT, directory: Path, sharded: bool) -> None:
    huggingface.to_hf(model, directory, shard_bytes=12_000 if sharded else 10**9)


def _same(a: GPT, b: GPT) -> bool:
    theirs = b.state_dict()
    return a.config == b.config and all(torch.equal(x, theirs[name]) for name, x in a.state_dict().items())


def _furnish(directory: Path) -> None:
    """What a user may keep beside a model, and what an older model of another program left."""
    (directory / "notes.txt").write_text("mine")
    (directory / "runs" / "deep").mkdir(parents=True)
    (directory / "runs" / "deep" / "log").write_text("mine too")
    (directory / "here").symlink_to("notes.txt")
    (directory / "model.bin").mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"an adapter")
    (directory / "pytorch_model.bin").write_bytes(b"an older model's")


def _model_files(directory: Path) -> set[str]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return {"config.json", "model.safetensors"}
    return {"config.json", index.name, *json.loads(index.read_text())["weight_map"].values()}


def _assert_furnished(directory: Path, model_files: set[str]) -> None:
    kept = {"notes.txt", "runs", "here", "adapter_model.safetensors", "model.bin"}
    assert {path.name for path in directory.iterdir()} == kept | model_files
    assert (directory / "runs" / "deep" / "log").read_text() == "mine too"
    assert (directory / "here").is_symlink() and (directory / "here").read_text() == "mine"


def _no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())


def _no_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(new: Path, old: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(atomic, "exchange", refuse)


def _no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def _within(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda _: True)


# How the file system is, and whether a kill may leave a directory that from_hf refuses.
WAYS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], bool]] = {
    "exchange": (lambda _: None, False),
    "two renames": (_no_exchange, True),
    "one by one": (_no_swap, True),
    "no links": (_no_links, True),
    "mount point": (_within, True),
}


@pytest.fixture(params=WAYS)
def may_refuse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    prepare, refused = WAYS[request.param]
    prepare(monkeypatch)
    return refused


@pytest.mark.parametrize("sharded", [False, True], ids=["to shards", "from shards"])
def test_a_new_model_replaces_all_of_the_old_and_nothing_else(
    sharded: bool, may_refuse: bool, tmp_path: Path
) -> None:
    target, new = tmp_path / "model", _model(3)
    _write(_model(2), target, sharded)
    _furnish(target)
    _write(new, target, not sharded)
    assert _same(huggingface.from_hf(target), new)
    files = _model_files(target)
    assert (len(files) == 2) if sharded else (len(files) > 4)
    _assert_furnished(target, files)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _killed_at(step: int, work: Callable[[], None]) -> bool:
    """Whether ``work``, in a process of its own, was ended before its ``step``-th change of the disk."""
    child = os.fork()
    if child == 0:
        try:
            _end_before(step)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def _end_before(step: int) -> None:
    left = [step]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)
            return call(*args, **keywords)

        return wrapper

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    atomic.exchange = counted(atomic.exchange)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("may_refuse", "sharded"),
    [("exchange", False), ("exchange", True), ("two renames", False), ("one by one", False), ("one by one", True),
     ("no links", True), ("mount point", False)],
    indirect=["may_refuse"],
)  # fmt: skip
def test_a_kill_at_any_step_leaves_one_model_or_a_refusal(
    sharded: bool, may_refuse: bool, tmp_path: Path
) -> None:
    old, new = _model(2), _model(3)
    _write(old, tmp_path / "before", sharded)
    _furnish(tmp_path / "before")
    found = []
    for step in range(1, 1000):
        target = tmp_path / f"{step}" / "model"
        shutil.copytree(tmp_path / "before", target, symlinks=True)
        if not _killed_at(step, lambda target=target: _write(new, target, not sharded)):  # type: ignore[misc]
            break
        try:
            read = huggingface.from_hf(target)
        except UserError as error:
            assert may_refuse and (
                "config.json: no such file" in str(error) or "no directory at" in str(error)
            )
            found.append("refused")
        else:
            assert _same(read, old) or _same(read, new)
            found.append("old" if _same(read, old) else "new")
        # The next one takes over, and clears away what was left.
        _write(new, target, not sharded)
        assert _same(huggingface.from_hf(target), new)
        assert [path.name for path in target.parent.iterdir()] == ["model"]
        _assert_furnished(target, _model_files(target))
        shutil.rmtree(target.parent)
    else:
        pytest.fail("did not end")
    assert len(found) > 10 and found[0] == "old" and found[-1] == "new"
    assert found == sorted(found, key=["old", "refused", "new"].index)
    assert ("refused" in found) == may_refuse


def test_what_another_program_writes_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, exchange = tmp_path / "model", atomic.exchange
    _write(_model(2), target, False)
    _furnish(target)

    def late(new: Path, old: Path) -> None:
        (old / "runs" / "late").write_text("mine")
        exchange(new, old)

    monkeypatch.setattr(atomic, "exchange", late)
    _write(_model(3), target, False)
    assert (target / "runs" / "late").read_text() == "mine"
    _assert_furnished(target, _model_files(target))


def test_an_error_at_the_last_moment_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _model(2)
    _write(old, tmp_path / "model", False)

    def full(new: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "exchange", full)
    with pytest.raises(UserError, match="the disk is full; what was there before is unchanged"):
        _write(_model(3), tmp_path / "model", True)
    assert _same(huggingface.from_hf(tmp_path / "model"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_between_two_files_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(_model(2), tmp_path / "model", False)
    _no_swap(monkeypatch)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(UserError, match="reports an error; it is incomplete and has no config.json now"):
            _write(_model(3), tmp_path / "model", True)
    with pytest.raises(UserError, match="config.json: no such file"):
        huggingface.from_hf(tmp_path / "model")
    _write(_model(3), tmp_path / "model", True)
    assert _same(huggingface.from_hf(tmp_path / "model"), _model(3))


def test_the_working_directory_and_a_link_to_one_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = _model(2), _model(3)
    _write(old, tmp_path / "model", False)
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path / "model")
    _write(new, Path("."), True)
    assert _same(huggingface.from_hf("."), new)
    monkeypatch.chdir(tmp_path)
    _write(old, Path("link"), False)
    assert (tmp_path / "link").is_symlink() and _same(huggingface.from_hf("model"), old)


def test_a_tokenizer_goes_with_its_model(tmp_path: Path) -> None:
    like, target = tmp_path / "like", tmp_path / "model"
    for directory, name in ((like, "tokenizer.json"), (target, "vocab.json")):
        _write(_model(2), directory, False)
        (directory / name).write_text("{}")
    huggingface.to_hf(_model(3), target)
    assert (target / "vocab.json").exists()  # nobody gave another
    huggingface.to_hf(_model(3), target, like=like)
    assert (target / "tokenizer.json").exists() and not (target / "vocab.json").exists()
    huggingface.to_hf(_model(2), target, like=target)
    assert (target / "tokenizer.json").exists() and _same(huggingface.from_hf(target), _model(2))


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        atomic.merged_directory(tmp_path / "model", owned=bool, key="config.json"),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        _write(_model(2), tmp_path / "model", False)


FOREVER = """
    import sys
    from tests.checkpoint.test_huggingface_writing import _model, _write
    from pathlib import Path
    models = [_model(2), _model(3)]
    for turn in range(10**6):
        _write(models[turn % 2], Path(sys.argv[1]), turn % 2 == 1)
        if turn == 3:
            print("ready", flush=True)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.0137, 0.0591])
def test_a_real_kill_leaves_one_of_the_models(seconds: float, tmp_path: Path) -> None:
    script = [sys.executable, "-c", textwrap.dedent(FOREVER), str(tmp_path / "model")]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    read = huggingface.from_hf(tmp_path / "model")
    assert _same(read, _model(2)) or _same(read, _model(3))
