"""A batch's weight makes the mean over an update that over its targets, however the update is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from gptcore.data.examples import Tokenised, lay_out, leaf_weight
from gptcore.models import GPT
from gptcore.train import from_table, optimizers, update
from gptcore.train.evaluation import tensors_of

from .toy import TINY_GPT, settings

RNG = np.random.default_rng(5)
EXAMPLES = [
    Tokenised.of(RNG.integers(0, 32, 2).tolist(), RNG.integers(0, 32, n).tolist()) for n in (1, 5, 2, 4)
]


class Micro(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray
    weight: float


class Pieces:
    """The four examples as one, two or four micro-batches."""

    def __init__(self, leaves: int, weighted: bool) -> None:
        self.each, self.leaves, self.weighted = len(EXAMPLES) // leaves, leaves, weighted

    def batch_at(self, step: int) -> Micro:
        first = step % self.leaves * self.each
        row = lay_out(EXAMPLES[first : first + self.each])
        whole = sum(example.targets for example in EXAMPLES)
        weight = leaf_weight(row.target_count, whole, self.leaves) if self.weighted else 1.0
        return Micro(row.tokens, row.targets, row.cu_seqlens, weight)


def gradient(tmp_path: Path, leaves: int, weighted: bool = True) -> tuple[torch.Tensor, float]:
    config = from_table(settings(tmp_path, model=TINY_GPT, data={"accumulate": leaves, "batch": 1}))
    model = GPT(config.model_config(), seed=1)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    config = config.with_overrides(["optimizer.name=sgd", "optimizer.max_norm=0.0", "optimizer.lr=1.0"])
    optimizer = optimizers.build(config.optimizer, model)
    loss = update(config, model, optimizer, Pieces(leaves, weighted), 0, lr=1.0)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return before - after, loss


def test_the_mean_is_over_targets_not_over_means_of_micro_batches(tmp_path: Path) -> None:
    whole, loss = gradient(tmp_path, 1)
    scale = float(whole.abs().max())
    for leaves in (2, 4):
        cut, cut_loss = gradient(tmp_path, leaves)
        assert float((cut - whole).abs().max()) < 1e-6 * max(scale, 1.0)
        assert cut_loss == pytest.approx(loss, abs=1e-6)
    naive, naive_loss = gradient(tmp_path, 4, weighted=False)
    assert abs(naive_loss - loss) > 1e-3 and float((naive - whole).abs().max()) > 1e-2 * scale


def test_further_arrays_reach_the_model_by_name() -> None:
    class Batch(NamedTuple):
        tokens: Any = np.zeros((1, 3), np.int64)
        targets: Any = np.zeros((1, 3), np.int64)
        options: Any = {"margins": np.float32([0.5]), "pairs": np.int64([[0, 1]])}  # noqa: RUF012

    _, _, options = tensors_of(Batch(), torch.device("cpu"))
    assert options["margins"].dtype == torch.float32 and options["pairs"].dtype == torch.int64
    assert options["pairs"].tolist() == [[0, 1]]
