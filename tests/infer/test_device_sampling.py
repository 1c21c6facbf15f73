"""Sampling where the logits are, against the processor's, row by row."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from gptcore.errors import UserError
from gptcore.infer import batch_sampling, device_sampling
from gptcore.infer.sampling import SamplingParams
from tests.infer.test_batch_sampling import SETTINGS, rows_of

SHAPES = [(1, 1.0), (13, 0.0), (40, 2.0), (257, 6.0), (3000, 1.0), (3000, 8.0)]


def assert_same(options: Any, vocab: int, scale: float, device: str) -> None:
    logits = rows_of(vocab, scale, n=150)
    params = SamplingParams(**options, seed=2**40 + 3)
    sequences, positions = np.arange(150) * 2**33 + 5, np.arange(150) % 11
    expected = batch_sampling.sample_rows(logits, params, sequences, positions)
    got = device_sampling.sample_rows(torch.from_numpy(logits).to(device), params, sequences, positions)
    for field in ("tokens", "kept_ids", "kept_counts"):
        one, other = getattr(got, field), getattr(expected, field)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and np.array_equal(one, other), field
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-12)
    np.testing.assert_allclose(got.entropies, expected.entropies, atol=1e-12)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize(("vocab", "scale"), SHAPES)
def test_the_same_tokens(options: Any, vocab: int, scale: float) -> None:
    assert_same(options, vocab, scale, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize(("vocab", "scale"), SHAPES)
def test_the_same_tokens_on_a_gpu(options: Any, vocab: int, scale: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    assert_same(options, vocab, scale, "cuda")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_row_among_good_ones_is_refused(bad: float, temperature: float) -> None:
    logits = torch.zeros(300, 5)
    logits[271, 2] = bad
    params = dataclasses.replace(SamplingParams(), temperature=temperature)
    with pytest.raises(UserError, match="logits are not finite"):
        device_sampling.sample_rows(logits, params, np.arange(300), np.arange(300))
    logits[271] = -torch.inf
    with pytest.raises(UserError, match="logits are not finite"):
        device_sampling.sample_rows(logits, params, np.arange(300), np.arange(300))
