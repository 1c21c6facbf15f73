"""Rollouts: the tokens of ``generate``'s arithmetic, whatever stands beside them, and honest log-probabilities."""

import numpy as np
import pytest
import torch

from gptcore.errors import UserError
from gptcore.infer import SamplingParams
from gptcore.infer.engine import decode_step, new_cache, prefill
from gptcore.infer.rollout import rollout
from gptcore.infer.sampling import probabilities, sample
from gptcore.models import GPT, GPTConfig

CONFIG = {
    "num_layers": 2, "width": 64, "vocab_size": 70, "context_length": 40, "init_std": 0.3,
    "attention": {"num_heads": 4},
}  # fmt: skip
STOP = 3


@pytest.fixture(scope="module")
def model():
    return GPT(GPTConfig.from_dict(CONFIG), seed=3)


def prompts_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 70, rng.integers(1, 9)).tolist() for _ in range(count)]


def same(a, i, b, j):
    """Sequence i of a is, bit for bit, sequence j of b."""
    one, other = a.select([i]), b.select([j])
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("tokens", "prompt_lengths", "logprobs", "entropies", "stopped")
    )


@pytest.mark.parametrize(
    "params",
    [SamplingParams(1.0, 0, 1.0, 5), SamplingParams(0.8, 6, 0.9, 5), SamplingParams(0.0)],
    ids=["free", "truncated", "greedy"],
)
def test_it_samples_what_one_sequence_alone_samples(model, params):
    prompts = prompts_of(5)
    got = rollout(model, prompts, max_new_tokens=12, params=params, stop_tokens=[STOP])
    for i, prompt in enumerate(prompts):
        ids = []
        with torch.inference_mode():
            cache = new_cache(model, 1, 40)
            logits = prefill(model, prompt, cache)
            while len(ids) < 12 and STOP not in ids:
                row = logits[0].numpy()
                ids.append(sample(row, params, i, len(ids)))
                # sums over 64 terms in another order
                expected = np.log(probabilities(row, params)[ids[-1]])
                assert got.logprobs[got.response_offsets[i] + len(ids) - 1] == pytest.approx(
                    expected, abs=1e-5
                )
                logits = decode_step(model, ids[-1:], cache)
        assert got.prompt(i).tolist() == prompt
        assert got.response(i).tolist() == ids
        assert got.finish_reasons[i] == ("stop" if ids[-1] == STOP else "length")


@pytest.mark.parametrize("params", [SamplingParams(1.0, 0, 1.0, 5), SamplingParams(0.8, 6, 0.9, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_sequence_does_not_depend_on_its_batch(params, dtype):
    model = GPT(GPTConfig.from_dict(CONFIG), seed=3, dtype=dtype)
    prompts = prompts_of(150)
    options = {"max_new_tokens": 16, "params": params, "stop_tokens": [STOP]}
    whole = rollout(model, prompts, **options)
    some = [140, 3, 77, 8]
    few = rollout(model, [prompts[i] for i in some], sequences=some, **options)
    assert all(same(whole, i, few, j) for j, i in enumerate(some))
    pieces = rollout(model, prompts, batch_size=66, **options)
    assert all(same(whole, i, pieces, i) for i in range(150))
    small = rollout(model, prompts, batch_size=64, **options)
    fewer = rollout(model, [prompts[i] for i in some], sequences=some, batch_size=3, **options)
    assert all(same(small, i, fewer, j) for j, i in enumerate(some))
    assert np.abs(small.select(some).logprobs[:4] - few.logprobs[:4]).max() <= (
        1e-5 if dtype == torch.float32 else 0.1
    )


def test_samples_of_one_prompt_share_its_prefill_and_differ(model):
    prompts = prompts_of(3)
    params = SamplingParams(1.0, 0, 1.0, 1)
    wide = rollout(model, prompts, max_new_tokens=8, params=params, num_samples=4)
    plain = rollout(model, [p for p in prompts for _ in range(4)], max_new_tokens=8, params=params)
    assert len(wide) == 12
    assert all(same(wide, i, plain, i) for i in range(12))
    assert len({tuple(wide.response(i)) for i in range(4)}) == 4
    assert wide.timing.prefill_tokens == sum(map(len, prompts))


def test_finished_rows_leave_the_cache(model, monkeypatch):
    rows = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, t, *a, **k: rows.append(len(t)) or forward(self, t, *a, **k)
    )
    model_stops = rollout(
        model, [[5, 6]] * 300, max_new_tokens=30, params=SamplingParams(1.0, 0, 1.0, 0), stop_tokens=range(25),
    )  # fmt: skip
    assert rows[:6] == [64, 64, 64, 64, 44, 300]  # prompts, 64 at a time, and the first step
    assert 65 <= rows[-1] <= 86  # fewer than 65 would change the bits of a product
    assert any(86 < n < 300 for n in rows)
    assert model_stops.response_lengths.max() <= 30


def test_lengths_and_reasons_are_exact(model):
    got = rollout(
        model, prompts_of(80), max_new_tokens=6, params=SamplingParams(1.0, 0, 1.0, 2), stop_tokens=range(8)
    )
    for i in range(80):
        response = got.response(i)
        assert not np.isin(response[:-1], range(8)).any()
        assert got.stopped[i] == (response[-1] < 8)
        assert len(response) == 6 or got.stopped[i]
    assert 0 < got.stopped.sum() < 80


def test_kept_sets_are_those_of_the_tokens(model):
    got = rollout(
        model, prompts_of(70), max_new_tokens=5, params=SamplingParams(0.9, 8, 0.9, 2), stop_tokens=[STOP]
    )
    sampled = got.tokens[got.response_places]
    counts = np.diff(got.kept.offsets)
    assert len(counts) == len(sampled) == got.response_offsets[-1] == len(got.logprobs)
    assert counts.min() >= 1 and counts.max() <= 8
    for i, token in enumerate(sampled):
        assert token in got.kept.ids[got.kept.offsets[i] : got.kept.offsets[i + 1]]
    order = [4, 60, 4]
    part = got.select(order)
    assert [part.response(j).tolist() for j in range(3)] == [got.response(i).tolist() for i in order]
    first, last = got.response_offsets[60], got.response_offsets[61]
    ids = got.kept.ids[got.kept.offsets[first] : got.kept.offsets[last]]
    own = part.response_offsets
    assert np.array_equal(part.kept.ids[part.kept.offsets[own[1]] : part.kept.offsets[own[2]]], ids)


def test_a_vocabulary_cut_short_samples_nothing_beyond(model):
    got = rollout(model, [[5]] * 70, max_new_tokens=8, params=SamplingParams(5.0, 0, 1.0), vocab_size=20)
    assert got.tokens[got.response_places].max() < 20


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 36], {}, "prompt 0 has 36 tokens and up to 6 more .* ask for at most 5"),
        ([[1, 70]], {}, "prompt 0 has token 70, the model's are 0 to 69"),
        ([], {}, "no prompt"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"num_samples": 0}, "num_samples is 0"),
        ([[1]], {"sequences": [1, 2]}, "sequences has 2 numbers, expected 1"),
        ([[1]], {"vocab_size": 71}, "vocab_size is 71"),
    ],
)
def test_bad_input_is_refused(model, prompts, options, sentence):
    with pytest.raises(UserError, match=sentence):
        rollout(model, prompts, **{"max_new_tokens": 6, "params": SamplingParams(), **options})


def test_a_prompt_may_fill_the_context(model):
    got = rollout(model, [[1] * 40, [1] * 39], max_new_tokens=1, params=SamplingParams())
    assert got.response_lengths.tolist() == [1, 1]
