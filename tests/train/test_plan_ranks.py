"""Planned memory against what 2 and 4 ranks hold."""

from __future__ import annotations

import pytest

from tests.dist.processes import cases_of, shared_verdicts

MODULES = ("tests.train.plan_cases",)


_FOUR = pytest.param(4, marks=pytest.mark.long)


@pytest.fixture(scope="module", params=[2, _FOUR], ids=["2-ranks", "4-ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return shared_verdicts(MODULES, request.param, tmp_path_factory, limit=200.0)


@pytest.mark.parametrize("name", cases_of(MODULES))
def test_ranks_hold_what_is_planned(found: dict[str, list[str]], name: str) -> None:
    failed = {rank: text for rank, text in enumerate(found[name]) if text}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
