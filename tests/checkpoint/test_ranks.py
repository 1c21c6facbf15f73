"""Checkpoints of four processes (the cases are in ``rank_cases.py`` and ``dtensor_cases.py``)."""

from __future__ import annotations

import pytest

from tests.dist.processes import cases_of, shared_verdicts

MODULES = ("tests.checkpoint.rank_cases", "tests.checkpoint.dtensor_cases")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return shared_verdicts(MODULES, 4, tmp_path_factory, limit=200.0)


@pytest.mark.parametrize("name", cases_of(MODULES))
def test_ranks_write_one_checkpoint(found: dict[str, list[str]], name: str) -> None:
    failed = {rank: text for rank, text in enumerate(found[name]) if text}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
