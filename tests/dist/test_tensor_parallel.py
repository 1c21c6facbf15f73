"""What 2 and 4 processes compute together with a model that is cut over them is what one computes (the cases are in
``tensor_parallel_cases.py``, ``mesh_cases.py`` and ``tensor_parallel_state_cases.py``)."""

from __future__ import annotations

import pytest
import torch

from gptcore import dist
from gptcore.dist.tensor_shard import TensorShard
from tests.dist.processes import cases_of, shared_verdicts

CUT = ("tests.dist.tensor_parallel_cases",)
OTHERS = ("tests.dist.mesh_cases", "tests.dist.tensor_parallel_state_cases")
RANKS = {"params": [2, 4], "ids": ["2-ranks", "4-ranks"]}
Verdicts = dict[str, list[str]]


@pytest.fixture(scope="module", **RANKS)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    return shared_verdicts(CUT, request.param, tmp_path_factory, limit=200.0)


@pytest.fixture(scope="module", **RANKS)
def others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    return shared_verdicts(OTHERS, request.param, tmp_path_factory, limit=200.0)


def assert_well(texts: list[str]) -> None:
    failed = {rank: text for rank, text in enumerate(texts) if text}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


@pytest.mark.parametrize("name", cases_of(CUT))
def test_ranks_give_what_one_process_gives(cut: Verdicts, name: str) -> None:
    assert_well(cut[name])


@pytest.mark.parametrize("name", cases_of(OTHERS))
def test_meshes_state_and_mistakes(others: Verdicts, name: str) -> None:
    assert_well(others[name])


def test_without_processes_a_sentence_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="'group': torch.distributed is not initialised; call"):
        dist.tensor_parallel(torch.nn.Linear(2, 2))


def test_pieces_make_up_the_whole_and_are_counted_once() -> None:
    whole = torch.arange(40.0).view(2, 20)
    pieces = (((0, 4), (12, 14)), ((4, 9), (14, 20)), ((9, 12), (14, 20)))
    shards = [TensorShard(dist.Member(None, rank, 3), 1, 20, pieces) for rank in range(3)]
    parts = [shard.take(whole) for shard in shards]
    assert [part.shape[1] for part in parts] == shards[0].sizes == [6, 11, 9]
    assert torch.equal(shards[0].joined(parts), whole)
    counted = [view for shard, part in zip(shards, parts, strict=True) for view in shard.counted_here(part)]
    assert sum(view.numel() for view in counted) == 40 and sum(float(view.sum()) for view in counted) == 780
