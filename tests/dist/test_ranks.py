"""What 2 and 4 processes compute together is what one computes (the cases are in ``moe_cases.py`` and
``model_cases.py``), and what is refused before any process waits for another."""

from __future__ import annotations

import pytest
import torch

from gptcore import dist, nn
from tests.dist.processes import cases_of, shared_verdicts

MODULES = ("tests.dist.moe_cases", "tests.dist.model_cases")


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return shared_verdicts(MODULES, request.param, tmp_path_factory, limit=200.0)


@pytest.mark.parametrize("name", cases_of(MODULES))
def test_ranks_give_what_one_process_gives(found: dict[str, list[str]], name: str) -> None:
    failed = {rank: text for rank, text in enumerate(found[name]) if text}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


def test_without_processes_a_sentence_says_what_is_missing() -> None:
    for call in (
        dist.expert_parallel,
        dist.average_gradients,
        lambda module: dist.clip_gradients(module, 1.0),
    ):
        with pytest.raises(RuntimeError, match="'group': torch.distributed is not initialised; call"):
            call(nn.MoE(8, 12, 4))
    with pytest.raises(ValueError, match="'max_norm': got 0, expected a number above 0"):
        dist.clip_gradients(nn.MoE(8, 12, 4), 0)


def test_slices_are_as_even_as_can_be() -> None:
    member = dist.Member(None, 1, 4)
    shard = dist.Shard.of(6, member)
    assert shard.bounds == (0, 2, 4, 5, 6) and (shard.start, shard.stop, shard.total) == (2, 4, 6)
    assert dist.Shard.of(8, member).sizes == [2, 2, 2, 2]


def test_whole_state_of_a_model_that_is_not_spread_is_its_own() -> None:
    layer = nn.MoE(8, 12, 4)
    state = dist.full_state_dict(layer)
    assert state.keys() == layer.state_dict().keys()
    other = nn.MoE(8, 12, 4)
    dist.load_full_state_dict(other, state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
