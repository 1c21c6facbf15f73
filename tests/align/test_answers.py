"""Prompts in their order, answers as text, rewards checked and shaped."""

import numpy as np
import pytest
import torch

from gptcore.align.answers import Shaping, by_answer, by_model, by_verifier, is_constant, rewarded
from gptcore.align.verifier import Job, Verifier
from gptcore.errors import UserError
from gptcore.infer import SamplingParams, rollout

from . import reinforcement_cases as world
from .test_expert_iteration import demonstrations


def test_each_task_is_seen_once_before_any_is_seen_again():
    prompts = world.prompts_of(*"abcdef", "ab")
    whole = prompts.at(0, 70)
    assert all(sorted(whole[first : first + 7]) == list(range(7)) for first in range(0, 70, 7))
    assert [*prompts.at(0, 5), *prompts.at(5, 30), *prompts.at(35, 35)] == whole
    assert whole[:7] != whole[7:14]


def test_answers_are_the_text_without_its_end():
    prompts = world.prompts_of("ab", "c")
    got = rollout(
        world.model_of(), prompts.ids, max_new_tokens=4, params=SamplingParams(1.0, 0, 1.0, 3), stop_tokens=[6],
        num_samples=20,
    )  # fmt: skip
    answers = prompts.answers(got, [0] * 20 + [1] * 20)
    assert {answer.stopped for answer in answers} == {True, False}
    for answer in answers:
        ids = answer.response_ids.tolist()
        assert answer.stopped == (ids[-1] == 6)
        assert answer.text == world.TOKENIZER.decode(ids[:-1] if answer.stopped else ids)
        assert len(answer.text) == len(ids) - answer.stopped
    assert [answer.task.prompt for answer in answers] == ["ab"] * 20 + ["c"] * 20


def test_rewards_are_checked():
    answers = world.prompts_of("ab").answers(demonstrations(("ab", "caa")), [0])
    assert rewarded(world.letters, answers).tolist() == [2.0]
    with pytest.raises(UserError, match="the judge gave 0 numbers for 1 answers"):
        rewarded(lambda answers: [], answers, "judge")
    with pytest.raises(UserError, match="the judge is nan for the answer 'caa' to 'ab'"):
        rewarded(by_answer(lambda task, text: float("nan")), answers, "judge")


def test_a_model_judges_whole_sequences():
    answers = world.prompts_of("ab").answers(demonstrations(("ab", "caa"), ("ab", "d")), [0, 0])
    seen = []

    def scores(examples):
        seen.extend(examples)
        return torch.tensor([float(len(example.tokens)) for example in examples])

    assert by_model(scores)(answers) == [6.0, 4.0]
    assert seen[0].tokens.tolist() == [0, 1, 2, 0, 0, 6]
    assert seen[0].loss_mask.tolist() == [False, False, True, True, True, True]


def test_a_verifier_judges_in_its_sandbox():
    answers = world.prompts_of("a").answers(demonstrations(("a", "b"), ("a", "dead")), [0, 0])
    with Verifier() as verifier:
        reward = by_verifier(verifier, lambda answer: Job(f"assert {answer.text!r} == 'b'"))
        assert reward(answers) == [1.0, 0.0]


def test_shaping():
    shown = demonstrations(("a", "bcd"), ("a", "b"), ("a", "bcdef"))  # 4, 2 and 6 tokens
    shown.stopped[2] = False
    scores = np.array([3.0, -0.5, 1.0])
    assert Shaping().shaped(scores, shown, 6).tolist() == [3.0, -0.5, 1.0]
    assert Shaping(clip=1.0).shaped(scores, shown, 6).tolist() == [1.0, -0.5, 1.0]
    assert Shaping(missing_end=2.0).shaped(scores, shown, 6).tolist() == [3.0, -0.5, -1.0]
    assert Shaping(missing_end=2.0, replaces_reward=True).shaped(scores, shown, 6).tolist() == [
        3.0,
        -0.5,
        -2.0,
    ]
    assert Shaping(overlong_buffer=4, overlong_penalty=0.4).shaped(
        scores, shown, 6
    ).tolist() == pytest.approx([2.8, -0.5, 0.6])


def test_constant_rewards_are_known():
    assert is_constant(np.full(3, 0.1) + np.array([0.0, 1e-17, 0.0])) and not is_constant(np.array([0.1]))
    assert not is_constant(np.array([0.1, 0.1000001]))
