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


def test_the_shares_of_mistakes_are_those_asked_for():
    tasks = arithmetic.split().train
    by_prompt = {t.prompt: t for t in tasks}
    counted = {True: [0, 0], False: [0, 0]}
    for d in arithmetic.demonstrations(tasks, 4000, noise=0.6, slips=0.2):
        a, b = by_prompt[d.prompt].extra["summands"]
        near, wrong = a % 10 + b % 10 in arithmetic.NEAR, d.completion != arithmetic.working(a, b)
        counted[near][0] += 1
        counted[near][1] += wrong
        if wrong:
            assert arithmetic.reward(by_prompt[d.prompt], d.completion) == 0.0
        if wrong and near:
            assert d.completion in (_carries_always(a, b), _carries_never(a, b))
    for near, share in ((True, 0.6), (False, 0.2)):
        number, wrong = counted[near]
        assert number > 1000 and abs(wrong / number - share) < 3 * (share * (1 - share) / number) ** 0.5
    clean = arithmetic.demonstrations(tasks, 100, noise=0.0, slips=0.0)
    assert all(arithmetic.reward(by_prompt[d.prompt], d.completion) == 1.0 for d in clean)


def _carries_always(a, b):
    return arithmetic.working(a, b, carries=lambda total: 1)


def _carries_never(a, b):
    return arithmetic.working(a, b, carries=lambda total: 0)


def test_who_carries_wrongly():
    assert _carries_never(47, 38) == "7+8=15,4+3=7;75"
    assert _carries_never(99, 99) == "9+9=18,9+9=18;188"
    assert _carries_never(90, 95) == arithmetic.working(90, 95) == "0+5=5,9+9=18;185"
    assert _carries_always(90, 95) == "0+5=5,9+9+1=19;195"


def test_each_way_to_slip_is_met_and_is_a_mistake():
    drawn = random.Random(1)
    made = {arithmetic.slipped(47, 38, drawn) for _ in range(2000)}
    assert "7+8=15,4+3=7;75" in made  # the carry
    assert {"3+8=11,4+3+1=8;81", "7+8=15,2+3+1=6;65"} <= made  # 47 misread
    assert {"7+8=15,4+3+1=8;82", "7+8=15,4+3+1=8;15"} <= made  # the sum
    assert all(arithmetic.reward(arithmetic.task(47, 38), text) == 0.0 for text in made)


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
    with pytest.raises(UserError, match="slips"):
        arithmetic.demonstrations([arithmetic.task(1, 2)], 3, slips=-0.1)
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
