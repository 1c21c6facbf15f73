"""Best of n, cloning, and expert iteration over both."""

import itertools
import math

import numpy as np
import pytest
import torch

from gptcore.align import expert_iteration, policy
from gptcore.align.behaviour_cloning import clone
from gptcore.align.best_of_n import best_of_n, divergence_bound, expected_best
from gptcore.align.expert_iteration import ExpertIterationSpec, selected
from gptcore.errors import UserError
from gptcore.infer import SamplingParams
from gptcore.infer.rollouts import pack
from gptcore.optim import AdamW
from gptcore.train.metrics import read

from . import reinforcement_cases as world


def demonstrations(*pairs):
    """Packed prompts and responses of letters, each response with the end of text."""
    encode = world.TOKENIZER.encode
    prompts = [np.array(encode(prompt), np.int32) for prompt, _ in pairs]
    responses = [[*encode(response), 6] for _, response in pairs]
    lengths = np.array([len(response) for response in responses])
    tokens = np.zeros((len(pairs), lengths.max()), np.int32)
    for row, response in zip(tokens, responses, strict=True):
        row[: len(response)] = response
    nothing = np.zeros(tokens.shape, np.float32)
    return pack(prompts, tokens, lengths, nothing, nothing, np.ones(len(pairs), bool))


def test_cloning_learns_what_it_is_shown():
    model = world.model_of()
    shown = demonstrations(("ab", "cd"), ("c", "e"), ("def", "abc"))
    optimizer = AdamW(model.parameters(), lr=0.02)
    first = clone(model, optimizer, shown, epochs=1, minibatch=3)
    last = clone(model, optimizer, shown, epochs=60, minibatch=2, seed=1)
    assert first["loss"] > 1.5 and last["updates"] == 120.0
    assert policy.evaluated(model, shown).logprobs.min() > math.log(0.8)


def test_cloning_is_a_mean_over_tokens_however_it_is_split():
    shown = demonstrations(("ab", "cdef"), ("c", "e"), ("def", "a"), ("a", "bcd"))
    found = []
    for max_tokens in (1000, 6):
        model = world.model_of()
        optimizer = AdamW(model.parameters(), lr=0.0)
        found.append(clone(model, optimizer, shown, minibatch=4, max_tokens=max_tokens))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], abs=1e-6)
    assert found[0]["loss"] == pytest.approx(
        -float(policy.evaluated(world.model_of(), shown).logprobs.mean()), abs=1e-6
    )


def test_the_best_of_n_is_the_best():
    prompts = world.prompts_of("ab", "c", "def")
    params = SamplingParams(1.0, 0, 1.0, 0)
    got = best_of_n(world.model_of(), prompts, world.letters, 16, max_new_tokens=5, params=params)
    assert got.scores.shape == (3, 16) and got.gold is None
    assert [world.count_of_a(None, answer.text) for answer in got.best] == got.scores.max(axis=1).tolist()
    assert [answer.task.prompt for answer in got.best] == ["ab", "c", "def"]


def test_expected_best_against_every_subset():
    rng = np.random.default_rng(0)
    scores, gold = np.round(rng.standard_normal((3, 6)), 1), rng.standard_normal((3, 6))
    for k in range(1, 7):
        subsets = [list(subset) for subset in itertools.combinations(range(6), k)]
        best = [[max(row[subset]) for subset in subsets] for row in scores]
        assert expected_best(scores, k) == pytest.approx(np.mean(best, axis=1))
        chosen = [
            [own[min(subset, key=lambda i, row=row: (-row[i], i))] for subset in subsets]
            for row, own in zip(scores, gold, strict=True)
        ]
        assert expected_best(scores, k, gold) == pytest.approx(np.mean(chosen, axis=1))
    assert divergence_bound(1) == 0.0 and divergence_bound(8) == pytest.approx(math.log(8) - 7 / 8)


def test_what_best_of_n_refuses():
    model, prompts = world.model_of(), world.prompts_of("ab")
    with pytest.raises(UserError, match="n is 0"):
        best_of_n(model, prompts, world.letters, 0, max_new_tokens=5, params=SamplingParams())
    with pytest.raises(UserError, match="all samples of a prompt are the same"):
        best_of_n(model, prompts, world.letters, 2, max_new_tokens=5, params=SamplingParams(0.0))
    with pytest.raises(UserError, match="k is 4, expected 1 to the 3 samples"):
        expected_best(np.zeros((2, 3)), 4)


def test_selection_takes_the_best_of_each_prompt_once():
    shown = demonstrations(
        *[("a", text) for text in ("b", "c", "c", "d")], *[("b", text) for text in ("e", "f", "e", "a")]
    )
    scores = np.array([1.0, 2.0, 2.0, 0.0, 0.5, 0.2, 0.5, 0.4])
    options = {"episodes": 8, "minibatch": 8, "samples": 4, "max_new_tokens": 5}
    assert selected(shown, scores, ExpertIterationSpec(**options)).tolist() == [1, 4]
    assert selected(shown, scores, ExpertIterationSpec(**options, keep=2)).tolist() == [0, 1, 4, 7]
    assert selected(shown, scores, ExpertIterationSpec(**options, keep=2, distinct=False)).tolist() == [
        1,
        2,
        4,
        6,
    ]
    assert selected(shown, scores, ExpertIterationSpec(**options, keep=2, threshold=0.45)).tolist() == [
        0,
        1,
        4,
    ]
    with pytest.raises(UserError, match="keep: 5 is more than expert_iteration.samples 4"):
        ExpertIterationSpec(**options, keep=5)


def expert(directory, steps, **own):
    options = {"episodes": 64, "minibatch": 8, "samples": 8, "max_new_tokens": 5}
    config, spec = world.settings_of(
        directory, ExpertIterationSpec, {"steps": steps, "optimizer": {"lr": 0.01}}, **{**options, **own}
    )
    actor = world.model_of()
    result = expert_iteration.run(
        config,
        spec,
        actor=actor,
        prompts=world.prompts_of("ab", "c", "def"),
        reward=world.letters,
        quiet=True,
    )
    return actor, result


def test_expert_iteration_improves_and_resumes(tmp_path):
    whole, result = expert(tmp_path / "whole", 6)
    rewards = [
        line["reward"] for line in read(tmp_path / "whole" / "metrics.jsonl") if line["kind"] == "train"
    ]
    assert rewards[0] < 1.0 and rewards[-1] > 3.0
    assert result.metrics["kept_reward"] >= result.metrics["reward"]
    expert(tmp_path / "parts", 3)
    parts, _ = expert(tmp_path / "parts", 6)
    assert all(torch.equal(weight, parts.state_dict()[name]) for name, weight in whole.state_dict().items())


def test_a_threshold_that_nothing_reaches_changes_nothing(tmp_path):
    actor, result = expert(tmp_path, 2, threshold=100.0)
    assert result.metrics["kept_share"] == 0.0 and result.metrics["updates"] == 0.0
    assert all(
        torch.equal(weight, world.model_of().state_dict()[n]) for n, weight in actor.state_dict().items()
    )
