"""Prepare: what goes in comes out, the directory is whole or not there, and errors spoil nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcore.data import tokenizer
from gptcore.data.atomic import atomic_directory, atomic_file, write_text
from gptcore.data.dataset import TokenDataset
from gptcore.data.loader import Evaluation, Loader
from gptcore.data.prepare import Prepared, prepare
from gptcore.errors import UserError

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


def documents(path: Path, count: int = 400) -> Path:
    lines = [
        json.dumps({"text": f"Document {i}: " + "the cat sat on the mat. " * (i % 7)}) for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(inputs: Any, output: Path, **options: Any) -> Prepared:
    return prepare(inputs, output, **{"quiet": True, **options})


def texts(directory: Path, split: str) -> list[str]:
    """The documents of a part, decoded."""
    ids, found = tokenizer.load(directory), []
    for shard in TokenDataset.open(directory, split).shards:
        begin = 0
        for end in shard.document_ends.tolist():
            found.append(ids.decode(shard.read(begin, end)))
            begin = end
    return found


@pytest.mark.parametrize("kind", ["bpe", "characters", "bytes"])
def test_what_goes_in_comes_out(tmp_path: Path, kind: str) -> None:
    source = documents(tmp_path / "a.jsonl")
    size = 300 if kind == "bpe" else None
    made = run(source, tmp_path / "out", tokenizer=kind, vocab_size=size, val_fraction=0.1, shard_tokens=4000)
    originals = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    train, val = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(originals) and val
    assert made.documents == {"train": len(train), "val": len(val)}
    assert made.text_bytes == {"train": sum(map(len, train)), "val": sum(map(len, val))}
    data = TokenDataset.open(tmp_path / "out")
    assert made.tokens["train"] == data.tokens and len(data.shards) > 1
    assert data.fingerprint == made.tokenizer.fingerprint == made.manifest["tokenizer"]["fingerprint"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == made.manifest
    assert next(Loader(data, 4, 32, seed=1, documents=True)).tokens.shape == (4, 32)


def test_preparing_is_deterministic(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")
    for name in ("one", "two"):
        run(source, tmp_path / name, vocab_size=400)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"TinyShakespeare is not at {SHAKESPEARE}")
def test_tiny_shakespeare_is_nanogpts(tmp_path: Path) -> None:
    """65 characters, the first 90% to train on: the counts that nanoGPT prints."""
    made = run(SHAKESPEARE, tmp_path / "out", tokenizer="characters", val_fraction=0.1)
    assert made.tokens == {"train": 1_003_854, "val": 111_540}
    assert (made.tokenizer.vocab_size, made.tokenizer.eot) == (65, None)
    text = SHAKESPEARE.read_text()
    assert texts(tmp_path / "out", "train") == [text[:1_003_854]]
    assert texts(tmp_path / "out", "val") == [text[1_003_854:]]
    batches = Evaluation(TokenDataset.open(tmp_path / "out", "val"), 12, 64)
    assert (
        sum(batch.target_count for batch in batches)
        == sum(batch.target_bytes for batch in batches)
        == 111_539
    )


def test_builtin_in_a_few_seconds(tmp_path: Path) -> None:
    made = run("builtin", tmp_path / "out", vocab_size=1000, max_bytes=600_000)
    assert made.tokenizer.vocab_size == 1000 and 500_000 < sum(made.text_bytes.values()) <= 600_000
    assert made.manifest["inputs"][0]["licence"] == "PSF-2.0"
    assert made.seconds < 60  # about two; the limit only catches a change of its order


def test_a_tokenizer_that_is_there_is_used(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")
    first = run(source, tmp_path / "one", vocab_size=400)
    second = run(source, tmp_path / "two", tokenizer=tmp_path / "one", shard_tokens=10**9)
    third = run(source, tmp_path / "three", tokenizer=first.tokenizer)
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint == third.tokenizer.fingerprint
    with pytest.raises(UserError, match="is loaded, not trained"):
        run(source, tmp_path / "four", tokenizer=str(tmp_path / "one"), vocab_size=300)


def test_training_a_vocabulary_on_a_sample(tmp_path: Path) -> None:
    """A cap on the text that bpe learns from gives another vocabulary, not other data."""
    source = documents(tmp_path / "a.jsonl", 2000)
    made = run(source, tmp_path / "out", vocab_size=2000, tokenizer_bytes=20_000)
    whole = run(source, tmp_path / "whole", vocab_size=2000)
    assert made.tokenizer.fingerprint != whole.tokenizer.fingerprint
    assert made.documents == whole.documents and made.text_bytes == whole.text_bytes


def test_held_out_characters_have_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 90 + "é" * 10)
    assert (
        run(
            tmp_path / "a.txt", tmp_path / "out", tokenizer="characters", val_fraction=0.1
        ).tokenizer.vocab_size
        == 2
    )


def test_unknown_characters_name_their_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "abc"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "ab"}\n{"text": "ba"}\n')
    run(tmp_path / "b.jsonl", tmp_path / "two", tokenizer="characters", val_fraction=0)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: encode: character 'c'"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path / "two", val_fraction=0)
    assert not (tmp_path / "out").exists()


def test_existing_data_is_kept_unless_told(tmp_path: Path) -> None:
    source, output = documents(tmp_path / "a.jsonl"), tmp_path / "out"
    run(source, output, tokenizer="bytes")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    with pytest.raises(UserError, match="already holds prepared data"):
        run(source, output, tokenizer="bytes")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        run([source, tmp_path / "bad.jsonl"], output, tokenizer="bytes", overwrite=True)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    run(documents(source, 100), output, tokenizer="bytes", overwrite=True, val_fraction=0)
    assert TokenDataset.open(output).documents == 100
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "bad.jsonl", "out"]


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty and holds no prepared data"):
            run(source, tmp_path / "out", overwrite=overwrite)
    with pytest.raises(UserError, match="is a file"):
        run(source, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction: got 1.0"),
        ({"val_fraction": 1e-9}, "none of the 400 documents fell into 'val'"),
        ({"split": "tial"}, "did you mean 'tail'"),
        ({"tokenizer": "missing"}, "no tokenizer at 'missing'"),
        ({"vocab_size": 100}, "vocab_size: got 100"),
        ({"shard_tokens": 0}, "shard_tokens: got 0"),
        ({"text_field": "body"}, "no field 'body'"),
    ],
)
def test_bad_options_make_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = documents(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "out", **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_empty_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "a.jsonl").write_text("")
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(UserError, match="the input holds no text"):
            run(tmp_path / name, tmp_path / "out", tokenizer="bytes", val_fraction=0)


def test_kill_leaves_no_directory_and_the_next_run_succeeds(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl", 200_000)
    program = "import sys; from gptcore.data.prepare import *; prepare(*sys.argv[1:], tokenizer='bytes')"
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(tmp_path / "out")], stderr=subprocess.PIPE
    )
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 60
    while not any(partial.glob(".train*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert partial.exists() and not (tmp_path / "out").exists()
    run(documents(source, 50), tmp_path / "out", tokenizer="bytes", val_fraction=0)
    assert TokenDataset.open(tmp_path / "out").documents == 50 and not partial.exists()


def _mount_small_disk(at: Path) -> bool:
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(at)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def test_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if not _mount_small_disk(disk):
        pytest.skip("mounting a small file system needs more rights than this process has")
    try:
        run(documents(tmp_path / "a.jsonl", 100), disk / "out", tokenizer="bytes", val_fraction=0)
        before = np.array(TokenDataset.open(disk / "out").shards[0].read(0, 100))
        with pytest.raises(UserError, match="the disk is full; what was there before is unchanged"):
            run(documents(tmp_path / "a.jsonl", 9000), disk / "out", tokenizer="bytes", overwrite=True)
        assert [entry.name for entry in disk.iterdir()] == ["out"]
        assert np.array_equal(TokenDataset.open(disk / "out").shards[0].read(0, 100), before)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_damaged_manifest_and_wrong_split(tmp_path: Path) -> None:
    run(documents(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer="bytes")
    with pytest.raises(UserError, match="unknown split 'vall'; did you mean 'val'"):
        TokenDataset.open(tmp_path / "out", "vall")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="damaged manifest"):
        TokenDataset.open(tmp_path / "out")


def test_atomic_file_keeps_the_old_one_when_the_block_fails(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyError), atomic_file(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and len([*tmp_path.iterdir()]) == 1
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        (tmp_path / "other").open()  # not about the file being written: passed on as it is
    with pytest.raises(UserError, match="a part of the path is a file"):
        write_text(tmp_path / "a" / "b", "x")


def test_directories_change_places_without_the_exchange_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels and file systems without renameat2 get the two renames."""
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "d", replace=True) as directory:
            write_text(directory / "f", text)
    assert (tmp_path / "d" / "f").read_text() == "two" and [e.name for e in tmp_path.iterdir()] == ["d"]


def test_a_file_does_not_replace_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="it is a directory"):
        write_text(tmp_path / "a", "x")


def test_directories_have_one_writer(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "d") as directory:
        with (
            pytest.raises(UserError, match="another process is writing it"),
            atomic_directory(tmp_path / "d"),
        ):
            pass
        write_text(directory / "f", "x")
    assert (tmp_path / "d" / "f").read_text() == "x"
