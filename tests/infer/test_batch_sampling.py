"""Sampling of many rows against the sampling of one, token by token."""

import numpy as np
import pytest

from gptcore.errors import UserError
from gptcore.infer.batch_sampling import sample_rows, uniforms
from gptcore.infer.sampling import SamplingParams, probabilities, sample, uniform

SETTINGS = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.7, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 5, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 7, "top_p": 0.6},
    {"temperature": 2.0, "top_p": 0.99},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0},
    {"temperature": 0.0},
]


def rows_of(vocab, scale, seed=0, n=64):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((n, vocab)) * scale).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # rows with ties
    if vocab > 3:
        logits[1::4, :2] = -np.inf  # rows with forbidden tokens
    return logits


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("vocab", "scale"), [(1, 1.0), (13, 0.0), (40, 2.0), (257, 6.0), (3000, 1.0), (3000, 8.0)]
)
def test_tokens_are_those_of_one_row_at_a_time(options, vocab, scale):
    logits = rows_of(vocab, scale)
    params = SamplingParams(**options, seed=2**40 + 3)
    sequences = np.arange(64) * 2**33 + 5
    positions = np.arange(64) % 11
    got = sample_rows(logits, params, sequences, positions)
    each = [sample(logits[i], params, int(sequences[i]), int(positions[i])) for i in range(64)]
    assert got.tokens.tolist() == each
    offsets = np.concatenate([[0], np.cumsum(got.kept_counts)]) if got.kept_ids is not None else None
    for i in range(64):
        probs = probabilities(logits[i], params)
        assert got.logprobs[i] == pytest.approx(np.log(probs[each[i]]), abs=1e-12)
        possible = np.flatnonzero(probs)
        entropy = -(probs[possible] * np.log(probs[possible])).sum()
        assert got.entropies[i] == pytest.approx(entropy, abs=1e-12)
        if offsets is not None:
            assert got.kept_ids[offsets[i] : offsets[i + 1]].tolist() == possible.tolist()


def test_only_truncation_keeps_sets():
    logits = rows_of(13, 1.0)
    numbers = np.arange(64)
    free = sample_rows(logits, SamplingParams(1.0, top_k=0, top_p=1.0), numbers, numbers)
    wide = sample_rows(logits, SamplingParams(1.0, top_k=13, top_p=1.0), numbers, numbers)
    assert free.kept_ids is None and wide.kept_ids is None
    assert (
        sample_rows(logits, SamplingParams(1.0, top_k=12, top_p=1.0), numbers, numbers).kept_counts
        is not None
    )


def test_blocks_of_rows_change_nothing(monkeypatch):
    logits, numbers = rows_of(40, 3.0), np.arange(64)
    params = SamplingParams(0.9, top_k=9, top_p=0.9, seed=1)
    whole = sample_rows(logits, params, numbers, numbers)
    monkeypatch.setattr("gptcore.infer.batch_sampling._BLOCK", 7 * 40)
    for one, other in zip(whole, sample_rows(logits, params, numbers, numbers), strict=True):
        assert np.array_equal(one, other)


def test_uniforms_are_those_of_one_place():
    sequences = np.array([0, 1, 2**32, 2**40 + 9])
    positions = np.array([0, 7, 2**33, 3])
    expected = [uniform(9, int(s), int(p)) for s, p in zip(sequences, positions, strict=True)]
    assert uniforms(9, sequences, positions).tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_among_good_ones_is_refused(bad):
    logits = rows_of(13, 1.0)
    logits[60, 4] = bad
    with pytest.raises(UserError, match="not finite"):
        sample_rows(logits, SamplingParams(), np.arange(64), np.arange(64))
