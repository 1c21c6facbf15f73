"""Additions with the working shown: what is made is right, wrong where asked for, and never seen before."""

from __future__ import annotations

import random

import pytest

from gptcore.align.tasks import arithmetic
from gptcore.errors import UserError


@pytest.mark.parametrize(
    "a, b, completion",
    [(47, 38, "7+8=15,4+3+1=8;85"), (99, 99, "9+9=18,9+9+1=19;198"), (10, 10, "0+0=0,1+1=2;20"),
     (95, 8, "5+8=13,9+0+1=10;103")],
)  # fmt: skip
def test_the_working(a, b, completion):
    assert arithmetic.working(a, b) == completion
    assert arithmetic.reward(arithmetic.task(a, b), completion) == 1.0


def test_every_addition_is_right_and_spelled_with_the_alphabet():
    train, held_out = arithmetic.split()
    assert len(train) + len(held_out) == 8100 and len(held_out) in (1500, 1501)
    for task in (*train, *held_out):
        completion = arithmetic.working(*task.extra["summands"])
        assert arithmetic.reward(task, completion) == 1.0
        assert set(task.prompt + completion) <= set(arithmetic.ALPHABET)


def test_held_out_pairs_are_not_trained_on_in_either_order():
    train, held_out = arithmetic.split(1500, seed=3)
    pairs = [{frozenset(t.extra["summands"]) for t in part} for part in (train, held_out)]
    assert not pairs[0] & pairs[1]


def test_a_seed_decides_everything():
    tasks = arithmetic.split(seed=1).train
    assert tasks == arithmetic.split(seed=1).train != arithmetic.split(seed=2).train
    assert arithmetic.demonstrations(tasks, 50, seed=4) == arithmetic.demonstrations(tasks, 50, seed=4)
    assert arithmetic.demonstrations(tasks, 50, seed=4) != arithmetic.demonstrations(tasks, 50, seed=5)
    assert arithmetic.rankings(tasks, 20, seed=4) == arithmetic.rankings(tasks, 20, seed=4)


def test_the_share_of_mistakes_is_the_one_asked_for():
    tasks = arithmetic.split().train
    made = arithmetic.demonstrations(tasks, 4000, noise=0.25)
    by_prompt = {t.prompt: t for t in tasks}
    wrong = [d for d in made if d.completion != arithmetic.working(*by_prompt[d.prompt].extra["summands"])]
    assert abs(len(wrong) / 4000 - 0.25) < 3 * (0.25 * 0.75 / 4000) ** 0.5
    for d in wrong:
        summands = by_prompt[d.prompt].extra["summands"]
        right, forgetful = arithmetic.working(*summands), arithmetic.working(*summands, forgets=True)
        if forgetful != right:
            assert d.completion == forgetful and arithmetic.reward(by_prompt[d.prompt], forgetful) == 0.0
        else:
            assert sum(x != y for x, y in zip(d.completion, right, strict=True)) == 1
    assert all(d.completion for d in arithmetic.demonstrations(tasks, 100, noise=0.0))


def test_who_forgets_to_carry():
    assert arithmetic.working(47, 38, forgets=True) == "7+8=15,4+3=7;75"
    assert arithmetic.working(99, 99, forgets=True) == "9+9=18,9+9=18;188"
    assert arithmetic.working(90, 95, forgets=True) == arithmetic.working(90, 95) == "0+5=5,9+9=18;185"


@pytest.mark.parametrize(
    "completion, reward, grade",
    [("7+8=15,4+3+1=8;85", 1.0, 0.0), ("nonsense;85", 1.0, 0.0), (";86", 0.0, 1.0), (";5", 0.0, 1.0),
     (";185", 0.0, 1.0), (";8 5", 0.0, 10.0), ("85", 0.0, 10.0), ("", 0.0, 10.0), (";", 0.0, 10.0),
     (";85855", 0.0, 10.0), (";085", 0.0, 1.0)],
)  # fmt: skip
def test_rewards_and_grades(completion, reward, grade):
    task = arithmetic.task(47, 38)
    assert (arithmetic.reward(task, completion), arithmetic.grade(task, completion)) == (reward, grade)


def test_rankings_agree_with_the_verifier_up_to_their_noise():
    tasks = arithmetic.split().train
    by_prompt = {t.prompt: t for t in tasks}
    right = [0, 0]
    for which, noise in enumerate((0.0, 0.3)):
        made = arithmetic.rankings(tasks, 300, k=6, noise=noise)
        assert len(made) == 300 and all(len(r.answers) == 6 for r in made)
        for r in made:
            grades = [arithmetic.grade(by_prompt[r.prompt], a) for a in r.answers]
            right[which] += sum(x == y for x, y in zip(grades, r.ranks, strict=True))
    assert right[0] == 1800
    assert 0.80 < right[1] / 1800 < 0.95  # a confused grade may draw one equal to its own


def test_a_models_own_answers_are_ranked_and_indifference_is_not():
    task, drawn = arithmetic.task(47, 38), random.Random(0)
    made = arithmetic.ranking(task, [";85", ";86", ";85", " ", "x"], 0.0, drawn)
    assert made is not None and made.answers == (";85", ";86", "x") and made.ranks == (0.0, 1.0, 10.0)
    assert arithmetic.ranking(task, [";85", "1;85"], 0.0, drawn) is None
    assert arithmetic.ranking(task, [], 0.0, drawn) is None


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="digits"):
        arithmetic.split(digits=4)
    with pytest.raises(UserError, match="held_out 8100"):
        arithmetic.split(8100)
    with pytest.raises(UserError, match="noise"):
        arithmetic.demonstrations([arithmetic.task(1, 2)], 3, noise=1.5)
    with pytest.raises(UserError, match="no tasks"):
        arithmetic.demonstrations([], 3)
    with pytest.raises(UserError, match="k 1"):
        arithmetic.rankings([arithmetic.task(1, 2)], 3, k=1)


def test_columns_to_pretrain_on_are_right():
    texts = arithmetic.columns(200, seed=1)
    assert texts == arithmetic.columns(200, seed=1) != arithmetic.columns(200, seed=2)
    for column in ",".join(texts).split(","):
        left, right = column.split("=")
        assert sum(map(int, left.split("+"))) == int(right)
    assert set("".join(texts)) <= set(arithmetic.ALPHABET)
