"""Strategies of several processes: the cases of ``strategy_rank_cases.py`` on two ranks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.errors import UserError
from gptcore.optim import Adafactor, AdamW, FSDPOptimizer
from gptcore.train import from_table

from ..dist.processes import cases_of, shared_verdicts
from .toy import settings, train

MODULES = ["tests.train.strategy_rank_cases"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return shared_verdicts(MODULES, 2, tmp_path_factory, limit=300.0)


@pytest.mark.parametrize("case", cases_of(MODULES))
def test_on_two_ranks(found: dict[str, list[str]], case: str) -> None:
    assert found[case] == ["", ""], "\n".join(found[case])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parallel": {"strategy": "ddp", "zero": 2}}, "parallel.zero: only strategy zero has it, got 2 with ddp"),
        (
            {"parallel": {"strategy": "fsdp2", "fixed_tree": True}},
            "parallel.fixed_tree: only strategy zero has it, got True with fsdp2",
        ),
        ({"parallel": {"strategy": "dpp"}}, "did you mean 'ddp'"),
        (
            {"parallel": {"strategy": "fsdp2"}, "optimizer": {"name": "adafactor"}},
            "fsdp2 cuts weights anywhere between rows, and adafactor has statistics of more than one element",
        ),
        (
            {"parallel": {"strategy": "fsdp2"}, "optimizer": {"name": "adamw_8bit"}},
            "adamw_8bit has statistics of more than one element; use strategy zero or ddp",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        from_table(settings(tmp_path, **changes))


def test_alone_torchs_strategies_are_the_plain_loop(tmp_path: Path) -> None:
    plain, _ = train(settings(tmp_path / "plain", steps=3))
    for strategy in ("ddp", "fsdp2"):
        model, _ = train(settings(tmp_path / strategy, steps=3, parallel={"strategy": strategy}))
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_optimizers_that_fsdp_cannot_have_are_named() -> None:
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(TypeError, match="got Adafactor, expected SGD, Adam or AdamW of gptcore.optim"):
        FSDPOptimizer(Adafactor(layer.parameters()), layer)
    with pytest.raises(ValueError, match="got Parameter of 'weight', expected DTensors"):
        FSDPOptimizer(AdamW(layer.parameters()), layer)
    stepped = AdamW(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    stepped.step()
    with pytest.raises(ValueError, match="got one that has stepped"):
        FSDPOptimizer(stepped, layer)
