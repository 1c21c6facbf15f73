"""Checkpoints of one process: what was saved comes back bit for bit, whole, in parts and by ranges."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore import checkpoint
from gptcore.checkpoint import CheckpointError, Slice
from gptcore.dist import Member
from tests.checkpoint.checkpoint_cases import STATE, assert_same, make_tensors


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "a" / "b", 12, make_tensors(), STATE)
    tensors, state = checkpoint.load(path)
    assert_same(tensors, make_tensors())
    assert state == {**STATE, "step": 12}
    assert checkpoint.read_state(path) == state


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = checkpoint.save(tmp_path, 1, make_tensors(), {})
    assert sorted(os.listdir(path)) == ["manifest.json", "shard-00000-of-00001.safetensors"]
    assert_same(load_file(path / "shard-00000-of-00001.safetensors"), make_tensors())


def test_nothing_but_the_checkpoint_is_left(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, make_tensors(), {})
    assert os.listdir(tmp_path) == ["step-00000005"]


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


def test_every_nth_is_kept_for_good(tmp_path: Path) -> None:
    for step in range(1, 12):
        checkpoint.save(tmp_path, step, {"w": torch.zeros(2)}, {}, keep_last=2, keep_every=4)
    assert checkpoint.steps(tmp_path) == [4, 8, 10, 11]


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
        checkpoint.load(tmp_path / "step-00000001")


def test_only_what_is_asked_for_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, make_tensors(), {})
    want = make_tensors()
    for only in ("model/", ("optimizer/", "rng"), "adapter/"):
        assert_same(
            checkpoint.load(path, only=only)[0], {k: v for k, v in want.items() if k.startswith(only)}
        )
    found = checkpoint.load_latest(tmp_path, only="model/")
    assert found is not None and found.path == path
    assert_same(found.tensors, {k: v for k, v in want.items() if k.startswith("model/")})


def test_an_open_checkpoint_tells_what_it_holds(tmp_path: Path) -> None:
    opened = checkpoint.open(checkpoint.save(tmp_path, 7, make_tensors(), STATE))
    want = make_tensors()
    assert opened.names == sorted(want) and opened.step == 7 and opened.state == {**STATE, "step": 7}
    for name, tensor in want.items():
        assert (opened.shape(name), opened.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert opened.nbytes(name) == tensor.nbytes
        assert_same({name: opened.read(name)}, {name: tensor})
        assert_same({name: opened.read(name, 0)}, {name: tensor.reshape(-1)})
    with pytest.raises(
        ValueError, match=r"'model/weight': got elements 3 to 36, expected a range within the 35"
    ):
        opened.read("model/weight", 3, 36)
    with pytest.raises(KeyError):
        opened.read("absent")


@given(
    cuts=st.lists(st.integers(0, 60), max_size=5).map(sorted),
    start=st.integers(0, 60),
    stop=st.integers(0, 60),
)
def test_slices_cut_anywhere_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], start: int, stop: int
) -> None:
    whole = torch.randn(3, 4, 5)
    bounds = [0, *cuts, 60]
    slices = [Slice(whole.view(-1)[a:b], a, whole.shape) for a, b in itertools.pairwise(bounds)]
    opened = checkpoint.open(checkpoint.save(tmp_path_factory.mktemp("cut"), 0, {"w": slices[::-1]}, {}))
    assert_same({"w": opened.read("w")}, {"w": whole})
    start, stop = sorted((start, stop))
    assert_same({"w": opened.read("w", start, stop, verify=True)}, {"w": whole.view(-1)[start:stop]})


def test_what_was_begun_is_what_was_there(tmp_path: Path) -> None:
    """Tensors and state may change as soon as begin returns."""
    tensors, state = make_tensors(), {"list": [1]}
    with checkpoint.Writer(tmp_path, keep_last=2) as writer:
        assert writer.wait() is None
        for step in (1, 2, 3):
            writer.begin(step, tensors, state)
            for tensor in tensors.values():
                tensor.zero_()
            state["list"].append(step)
            assert step == 1 or checkpoint.steps(tmp_path)[-1] >= step - 1
            assert writer.wait() == checkpoint.path_of(tmp_path, step)
            loaded, read = checkpoint.load(tmp_path)
            assert_same(loaded, make_tensors(step - 1))
            assert read == {"list": [1, *range(1, step)], "step": step}
            tensors = make_tensors(step)
        writer.begin(4, tensors, {})
    assert checkpoint.steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": object()}])
def test_state_must_be_json(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="state"):
        checkpoint.save(tmp_path, 1, {}, state)
    assert os.listdir(tmp_path) == []


def test_a_group_of_one_needs_no_process_group(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, make_tensors(), {}, member=Member(None, 0, 1))
    assert_same(checkpoint.load(path)[0], make_tensors())


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step"):
        checkpoint.save(tmp_path, -1, {}, {})
    with pytest.raises(ValueError, match="keep_last"):
        checkpoint.save(tmp_path, 1, {}, {}, keep_last=0)
    with pytest.raises(ValueError, match="keep_every"):
        checkpoint.save(tmp_path, 1, {}, {}, keep_every=-1)
    four = torch.zeros(4)
    for value, sentence in {
        torch.zeros(1, dtype=torch.complex64): "complex64",
        torch.zeros(2, device="meta"): "'z': got a tensor on meta",
        torch.eye(2).to_sparse(): "torch.sparse_coo",
        Slice(four, 3, (6,)): r"'z': got a slice of shape \(4,\) from 3, expected one dimension within the 6",
        Slice(four.view(2, 2), 0, (6,)): "one dimension",
        (Slice(four, 0, (8,)), Slice(four, 4, (2, 4))): "expected those of one tensor",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            checkpoint.save(tmp_path, 1, {"z": value}, {})


def test_elements_that_are_missing_or_twice_there(tmp_path: Path) -> None:
    for starts, sentence in {
        (0,): "elements from 4 to 8 were passed by no rank",
        (4,): "elements from 0 to 4 were passed by no rank",
        (0, 2): "elements from 2 to 4 were passed by more than one rank",
    }.items():
        slices = [Slice(torch.zeros(4), start, (8,)) for start in starts]
        with pytest.raises(CheckpointError, match=f"step 1 to .*'w': {sentence}; there was none before"):
            checkpoint.save(tmp_path, 1, {"w": slices}, {})
    assert os.listdir(tmp_path) == []


def test_model_tensors_expand_tied_weights(tmp_path: Path) -> None:
    tensors = {"model/embedding.weight": torch.ones(3, 2), "optimizer/x": torch.zeros(1)}
    found = checkpoint.model_tensors(tensors, {"tied": {"head.weight": "embedding.weight"}})
    assert found.keys() == {"embedding.weight", "head.weight"}
