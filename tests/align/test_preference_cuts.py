"""KTO's reference point is a mean over the whole update, so its loss does not depend on how the update is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptcore import checkpoint
from gptcore.train.metrics import read
from tests.ranks import finish, start

from .preference_program import labels, learn, table_of
from .supervised_cases import base_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_run(tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels(tmp_path_factory.mktemp("data") / "labels.jsonl")


def weights(run_dir: Path) -> torch.Tensor:
    found = checkpoint.load_latest(run_dir / "checkpoints")
    assert found is not None
    tensors = checkpoint.model_tensors(found.tensors, found.state)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read(run_dir / "metrics.jsonl") if line["kind"] == "train"]


def test_an_update_does_not_depend_on_how_it_is_cut(base: Path, data: Path, tmp_path: Path) -> None:
    """The same answers as 1, 2 and 4 micro-batches: 1e-6 of the largest weight, and of the losses."""
    found = []
    for accumulate in (1, 2, 4):
        run_dir = tmp_path / str(accumulate)
        table = table_of(run_dir, base, data, batch=4 // accumulate, accumulate=accumulate)
        learn({**table, "log_every": 1})
        found.append((weights(run_dir), torch.tensor(losses(run_dir))))
    moved = float((found[0][0] - weights(base)).abs().max())
    assert moved > 1e-3 and len(found[0][1]) == 3
    for other in found[1:]:
        for one, first in zip(other, found[0], strict=True):
            assert float((one - first).abs().max()) < 1e-6 * max(1.0, float(first.abs().max()))


@pytest.mark.parametrize("strategy", ["zero", "ddp"])
def test_two_ranks_take_the_point_of_all(base: Path, data: Path, tmp_path: Path, strategy: str) -> None:
    """ZeRO's bits are those of one process; torch's sums are of another order, so roundings of f32 apart."""
    cut = {"batch": 1, "accumulate": 4}
    learn(table_of(tmp_path / "one", base, data, **cut))
    two = {**table_of(tmp_path / "two", base, data, **cut), "parallel": {"strategy": strategy}}
    for code, err in finish(start(2, "-m", "tests.align.preference_program", json.dumps(two)), timeout=90):
        assert code == 0, err
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert torch.equal(one, other) if strategy == "zero" else float((one - other).abs().max()) < 1e-6
