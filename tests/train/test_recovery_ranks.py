"""Recovery on two ranks: the same events and the same weights, whichever of them meets the trouble."""

from __future__ import annotations

import pytest

from ..dist.processes import cases_of, shared_verdicts

MODULES = ["tests.train.recovery_rank_cases"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return shared_verdicts(MODULES, 2, tmp_path_factory, limit=200.0)


@pytest.mark.parametrize("case", cases_of(MODULES))
def test_on_two_ranks(found: dict[str, list[str]], case: str) -> None:
    assert found[case] == ["", ""], "\n".join(found[case])
