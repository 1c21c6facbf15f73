"""The loop on the real model: it learns, whatever the thread count gives the same bits, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcore import backend, checkpoint
from gptcore.models import GPT
from gptcore.train import from_table, run
from gptcore.train.metrics import read

from .test_resume import kill_and_resume
from .toy import TINY_GPT, Batch, ToyLoader, settings, train


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(directory / "checkpoints")[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_without_falling_back_to_torch(tmp_path: Path, dtype: str) -> None:
    backend.reset_report()
    train(settings(tmp_path, dtype=dtype, model=TINY_GPT, steps=60), measure_peak=True)
    assert backend.report() == {}
    lines = read(tmp_path / "metrics.jsonl")
    held = [line["val_loss"] for line in lines if line["kind"] == "evaluation"]
    assert held[0] == pytest.approx(np.log(32), abs=0.1), "a fresh model is as good as a guess"
    assert held[-1] < held[0] - 1.0
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert 0 < last["mfu_causal_halved"] < last["mfu"] < 1
    assert last["model_flops_per_s"] == pytest.approx(
        last["tokens_per_s"] * (6 * 26_752 + 12 * 2 * 2 * 16 * 8)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_same_bits_for_1_2_and_4_threads(tmp_path: Path, dtype: str, packed: bool, threads: None) -> None:
    """A width of 80 and a vocabulary of 97: sizes whose products do not split evenly over threads."""

    class Documents(ToyLoader):
        def batch_at(self, step: int) -> Batch:
            bounds = np.array([0, 5, 40, 41, 96, 128], np.int32) if packed else None
            return super().batch_at(step)._replace(cu_seqlens=bounds)

    model = {**TINY_GPT, "width": 80, "vocab_size": 97, "context_length": 64, "dropout": 0.1}
    found = []
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        table = settings(
            out,
            dtype=dtype,
            threads=count,
            steps=4,
            data={"batch": 2, "length": 64, "accumulate": 2},
            model=model,
        )
        config = from_table(table)
        network = GPT(config.model_config(), seed=1)
        run(config, model=network, loader=Documents(2, 64, 97), measure_peak=False, quiet=True)
        found.append(weights(out))
    for other in found[1:]:
        assert [name for name in other if not torch.equal(other[name], found[0][name])] == []


def test_kill_and_resume_is_bitwise(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 1, slack=60, dtype="bfloat16", model={**TINY_GPT, "dropout": 0.1})


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_kills_and_resume_is_bitwise(tmp_path: Path, dtype: str) -> None:
    kill_and_resume(
        tmp_path, 10, slack=60, dtype=dtype, data={"accumulate": 2}, model={**TINY_GPT, "dropout": 0.1}
    )


def test_a_checkpoint_of_another_gpt_is_refused(tmp_path: Path) -> None:
    train(settings(tmp_path, model=TINY_GPT, steps=5))
    with pytest.raises(ValueError, match=r"is of another model \(num_layers 2 -> 3\)"):
        train(settings(tmp_path, model={**TINY_GPT, "num_layers": 3}))


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    config = from_table(settings(tmp_path, model={**TINY_GPT, "vocab_size": 16}))
    loader: Any = ToyLoader()
    loader.vocab_size = 32
    with pytest.raises(ValueError, match=r"model.vocab_size: 16 is less than the 32 of the data's tokenizer"):
        run(config, model=GPT(config.model_config()), loader=loader, measure_peak=False, quiet=True)
