"""Damaged checkpoints: found, said, and the last good one is used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from gptcore import checkpoint
from gptcore.checkpoint import CheckpointError
from tests.checkpoint.checkpoint_cases import STATE, as_format_2, assert_same, flip_bit, make_tensors


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """One bit in each of 150 places of each file, over manifest, header and data: none may pass."""
    path = checkpoint.save(tmp_path, 1, make_tensors(), STATE)
    assert len(files_of(path)) == 2
    for file in files_of(path):
        good = file.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 150)):
            flip_bit(file, position)
            with pytest.raises(CheckpointError):
                checkpoint.load(path)
            file.write_bytes(good)
    checkpoint.load(path)


def test_checkpoints_of_the_format_before_are_read_and_verified(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, make_tensors(), STATE)
    as_format_2(path)
    tensors, state = checkpoint.load(path)
    assert_same(tensors, make_tensors())
    assert state == {**STATE, "step": 1}
    flip_bit(files_of(path)[1], -1)
    with pytest.raises(CheckpointError, match="fails its checksum"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
@pytest.mark.parametrize("which", [0, 1], ids=["manifest", "shard"])
def test_truncation_is_found(tmp_path: Path, which: int, keep: float) -> None:
    path = checkpoint.save(tmp_path, 1, make_tensors(), STATE)
    file = files_of(path)[which]
    size = file.stat().st_size
    os.truncate(file, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(CheckpointError, match="step-00000001"):
        checkpoint.load(path)
    assert not checkpoint.steps(path) and checkpoint.steps(tmp_path) == [1]


def test_a_file_that_grew_is_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, make_tensors(), STATE)
    for file in files_of(path):
        good = file.read_bytes()
        file.write_bytes(good + b" ")
        with pytest.raises(CheckpointError, match="corrupt"):
            checkpoint.load(path)
        file.write_bytes(good)


@pytest.mark.parametrize(
    "which, sentence",
    [(0, "is incomplete: it has no manifest.json"), (1, "shard-00000-of-00001.safetensors: No such file")],
)
def test_a_missing_file_is_found(tmp_path: Path, which: int, sentence: str) -> None:
    path = checkpoint.save(tmp_path, 1, make_tensors(), STATE)
    files_of(path)[which].unlink()
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.load(path)


@pytest.mark.parametrize("which", [0, 1], ids=["manifest", "shard"])
def test_files_of_another_checkpoint_are_told_apart(tmp_path: Path, which: int) -> None:
    """Same tensors, same state: only the save was another."""
    paths = [checkpoint.save(tmp_path / str(i), 1, make_tensors(), STATE) for i in range(2)]
    shutil.copy(files_of(paths[0])[which], files_of(paths[1])[which])
    with pytest.raises(
        CheckpointError, match="the header of shard-00000-of-00001.safetensors fails its checksum"
    ):
        checkpoint.load(paths[1])


def test_a_foreign_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"files": []}))
    with pytest.raises(CheckpointError, match="manifest.json fails its checksum"):
        checkpoint.load(tmp_path)


def test_verify_names_everything_that_is_damaged(tmp_path: Path) -> None:
    opened = checkpoint.open(checkpoint.save(tmp_path, 1, make_tensors(), STATE))
    opened.verify()
    shard = opened.path / opened.manifest.shards[0].file
    data = bytearray(shard.read_bytes())
    for name in ("model/bf16", "optimizer/f64"):
        raw = make_tensors()[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        data[data.index(raw)] ^= 4
    shard.write_bytes(data)
    opened = checkpoint.open(opened.path)
    assert [name for name in opened.names if opened.problems(name)] == ["model/bf16", "optimizer/f64"]
    with pytest.raises(CheckpointError, match="tensor 'model/bf16' fails .*; .*tensor 'optimizer/f64' fails"):
        opened.verify()
    opened.verify(["model/weight"])
    assert_same({"w": opened.read("model/weight")}, {"w": make_tensors()["model/weight"]})
    with pytest.raises(CheckpointError, match="'model/bf16' fails its checksum in shard-00000-of-00001"):
        opened.read("model/bf16", 3, 4, verify=True)


def test_latest_falls_back_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, make_tensors(step), {})
    flip_bit(files_of(checkpoint.path_of(tmp_path, 3))[1], -1)
    os.truncate(files_of(checkpoint.path_of(tmp_path, 2))[0], 50)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, warn=said.append) == checkpoint.path_of(tmp_path, 1)
    assert len(said) == 2 and all("falling back to step 1" in line for line in said)
    assert "step-00000003" in said[0] and "step-00000002" in said[1]


def test_latest_default_warning_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, make_tensors(step), {})
    os.truncate(files_of(checkpoint.path_of(tmp_path, 2))[1], 50)
    assert checkpoint.latest(tmp_path) == checkpoint.path_of(tmp_path, 1)
    assert "falling back to step 1" in capsys.readouterr().err


def test_all_corrupt_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    os.truncate(files_of(checkpoint.save(tmp_path, 1, make_tensors(), {}))[0], 50)
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        checkpoint.latest(tmp_path)
