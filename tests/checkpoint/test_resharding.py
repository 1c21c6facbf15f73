"""A checkpoint in another number of files, as one file of weights, and there and back through torch.distributed's."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from gptcore import checkpoint
from gptcore.checkpoint import CheckpointError
from gptcore.checkpoint.resharding import divide
from gptcore.checkpoint.shard import Deferred
from gptcore.errors import UserError
from tests.checkpoint.checkpoint_cases import STATE, assert_same, flip_bit, make_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_reshard_there_and_back(tmp_path: Path, count: int) -> None:
    path = checkpoint.save(tmp_path / "a", 5, make_tensors(), STATE)
    told: list[int] = []
    there = checkpoint.reshard(path, count, tmp_path / "b", done=told.append)
    assert len(list(there.glob("shard-*.safetensors"))) == count
    tensors, state = checkpoint.load(there)
    assert_same(tensors, make_tensors())
    assert state == {**STATE, "step": 5}
    assert sum(told) == 2 * sum(tensor.nbytes for tensor in tensors.values())
    checkpoint.reshard(there, 1)
    assert os.listdir(tmp_path / "b") == ["step-00000005"] and len(os.listdir(there)) == 2
    assert_same(checkpoint.load(there)[0], make_tensors())


@given(
    sizes=st.lists(st.tuples(st.integers(0, 50), st.sampled_from([1, 2, 4, 8])), max_size=6),
    count=st.integers(1, 9),
)
def test_shards_are_even(sizes: list[tuple[int, int]], count: int) -> None:
    """Each element once and in order; a cut falls at most one element (8 bytes) beside its place."""
    types = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    wholes = {
        str(i): Deferred(types[width], (numel,), lambda a, b: torch.empty(0))
        for i, (numel, width) in enumerate(sizes)
    }
    shards = divide(wholes, count)
    total = sum(numel * width for numel, width in sizes)
    for pieces in shards:
        nbytes = sum(part.numel() * part.dtype.itemsize for _, _, _, part in pieces)
        assert abs(nbytes - total / count) < 1 + 8
    for name, whole in wholes.items():
        ranges = [
            (start, start + part.numel()) for shard in shards for n, start, _, part in shard if n == name
        ]
        assert [a for a, _ in ranges] + [whole.numel()] == [0] + [b for _, b in ranges]


def test_reshard_only_the_weights(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "a", 5, make_tensors(), STATE)
    there = checkpoint.reshard(path, 2, tmp_path / "b", only="model/")
    assert_same(
        checkpoint.load(there)[0], {k: v for k, v in make_tensors().items() if k.startswith("model/")}
    )


def test_a_damaged_checkpoint_is_not_passed_on(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "a", 5, make_tensors(), STATE)
    flip_bit(path / "shard-00000-of-00001.safetensors", -1)
    for convert in (
        lambda: checkpoint.reshard(path, 2, tmp_path / "b"),
        lambda: checkpoint.to_dcp(path, tmp_path / "b"),
        lambda: checkpoint.to_safetensors(path, tmp_path / "b", prefix="rng"),
    ):
        with pytest.raises(CheckpointError, match="'rng' fails its checksum"):
            convert()
        assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="'shards': got 0"):
        checkpoint.reshard(path, 0)


def test_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path, 5, make_tensors(), STATE)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="no space left"):
        patch.setattr(os, "fsync", no_space)
        checkpoint.reshard(path, 2)
    assert os.listdir(tmp_path) == ["step-00000005"]
    assert_same(checkpoint.load(path)[0], make_tensors())


def test_weights_as_one_file(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    first = checkpoint.save(tmp_path, 5, make_tensors(), {"tied": {"model/b": "model/weight"}})
    path = checkpoint.reshard(first, 3)
    file = checkpoint.to_safetensors(path, tmp_path / "weights.safetensors")
    want = {k[len("model/") :]: v for k, v in make_tensors().items() if k.startswith("model/")}
    assert_same(load_file(file), want)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "5", "tied": '{"model/b": "model/weight"}'}
    with pytest.raises(CheckpointError, match="no tensor under 'adapter/'"):
        checkpoint.to_safetensors(path, tmp_path / "x.safetensors", prefix="adapter/")


@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back_through_dcp(tmp_path: Path, shards: int) -> None:
    path = checkpoint.reshard(checkpoint.save(tmp_path / "a", 5, make_tensors(), STATE), shards)
    out = checkpoint.to_dcp(path, tmp_path / "dcp")
    told: list[int] = []
    back = checkpoint.from_dcp(out, tmp_path / "b", shards=shards, done=told.append)
    tensors, state = checkpoint.load(back)
    assert_same(tensors, make_tensors())
    assert state == {**STATE, "step": 5} and sum(told) == sum(t.nbytes for t in tensors.values())
    with pytest.raises(UserError, match="not empty"):
        checkpoint.to_dcp(path, tmp_path / "dcp")


def test_dcp_reads_ours_as_a_nested_state_dict(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "a", 5, make_tensors(), STATE)
    out = checkpoint.to_dcp(path, tmp_path / "dcp", only=("model/", "optimizer/"))
    want = make_tensors()
    found = {
        "model": {"weight": torch.zeros(7, 5), "bf16": torch.zeros(33, dtype=torch.bfloat16)},
        "optimizer": {"step": torch.tensor(0)},
    }
    dcp.load(found, checkpoint_id=out, no_dist=True)
    assert_same(found["model"], {name: want[f"model/{name}"] for name in ("weight", "bf16")})
    assert_same(found["optimizer"], {"step": want["optimizer/step"]})


def test_a_foreign_dcp_checkpoint(tmp_path: Path) -> None:
    """As torch's own training loop saves model and optimizer."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    tensors, state = checkpoint.load(checkpoint.from_dcp(tmp_path / "dcp", tmp_path / "a", step=7))
    assert state["step"] == 7
    assert_same(
        {k: v for k, v in tensors.items() if k.startswith("model/")},
        {f"model/{k}": v for k, v in weights.items()},
    )
    for name, kinds in moments["state"].items():
        assert_same({k: tensors[f"optim/state/{name}/{k}"] for k in kinds}, kinds)
    assert state["objects"]["optim/param_groups/0/lr"] == 0.1
    with pytest.raises(CheckpointError, match="does not say which step"):
        checkpoint.from_dcp(tmp_path / "dcp", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"no torch\.distributed\.checkpoint at .*absent: No such file"):
        checkpoint.from_dcp(tmp_path / "absent", tmp_path / "a")


def test_a_name_with_no_place_in_nested_dictionaries(tmp_path: Path) -> None:
    for names in itertools.permutations(("a", "a/b")):
        path = checkpoint.save(tmp_path / "x", 0, {name: torch.zeros(1) for name in names}, {})
        with pytest.raises(CheckpointError, match="is a tensor and also holds others"):
            checkpoint.to_dcp(path, tmp_path / "dcp")
