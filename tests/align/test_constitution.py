"""Critique, revision and preferences: by rule exactly, by a model in the words it is asked."""

from __future__ import annotations

import pytest

from gptcore.align import constitution
from gptcore.align.constitution import Critique
from gptcore.align.tasks import secrets
from gptcore.errors import UserError

RULES = secrets.CONSTITUTION
CRITIC, JUDGE = constitution.by_rule(secrets.broken)


def _leaky(count=40):
    tasks = [*secrets.hostile("train", count), *secrets.benign("train", count)]
    answers = [f"Sure: {t.extra['key']}." if t.extra["kind"] == "hostile" else str(t.truth) for t in tasks]
    return tasks, answers


def test_revision_by_rule_ends_every_breach_and_touches_nothing_else():
    tasks, answers = _leaky()
    assert sum(secrets.leaks(t, a) for t, a in zip(tasks, answers, strict=True)) == 40
    revisions = constitution.revise(tasks, answers, RULES, CRITIC, constitution.to_truth)
    for revision, answer in zip(revisions, answers, strict=True):
        assert secrets.broken(revision.task, revision.revised) == ()
        benign = revision.task.extra["kind"] == "benign"
        assert revision.versions == ((answer,) if benign else (answer, secrets.REFUSAL))
        assert len(revision.critiques) == 3
        assert {critique.principle.name for critique in revision.critiques} == {p.name for p in RULES}
    assert len(constitution.demonstrations(revisions)) == 80
    changed = constitution.demonstrations(revisions, changed_only=True)
    assert len(changed) == 40 and {d.completion for d in changed} == {secrets.REFUSAL}


def test_the_order_of_principles_is_drawn_from_the_seed():
    tasks, answers = _leaky(10)

    def orders(seed):
        made = constitution.revise(tasks, answers, RULES, CRITIC, constitution.to_truth, seed=seed)
        return [[c.principle.name for c in r.critiques] for r in made]

    assert orders(0) == orders(0) != orders(1)
    assert len({tuple(order) for order in orders(0)}) > 1
    twice = constitution.revise(tasks[:1], answers[:1], RULES, CRITIC, constitution.to_truth, rounds=5)
    assert len(twice[0].critiques) == 5


def test_preferences_by_rule():
    task = secrets.hostile("train", 1)[0]
    leak = f"Sure: {task.extra['key']}."
    made = constitution.preferences([task], [[leak, secrets.REFUSAL, "No.", leak, " "]], RULES, JUDGE)
    assert len(made) == 1 and made[0].answers == (leak, secrets.REFUSAL, "No.")
    assert (
        made[0].ranks == (-1.0, -3.0, -2.0) and made[0].chosen == secrets.REFUSAL and made[0].rejected == leak
    )
    assert constitution.preferences([task], [["No.", "Never."]], RULES, JUDGE) == []
    one = constitution.preferences([task] * 50, [[leak, secrets.REFUSAL]] * 50, RULES, JUDGE, per_answer=1)
    assert 10 < len(one) < 50  # helpfulness says nothing of an attack


def test_a_model_is_asked_in_words():
    heard = []

    def speaker(prompts):
        heard.extend(prompts)
        return [" Yes, it does." if "Critique request" in p else " A better answer. " for p in prompts]

    critic, reviser = constitution.asked(speaker)
    task = secrets.hostile("train", 1)[0]
    made = constitution.revise([task], ["Sure."], RULES[:1], critic, reviser)
    assert made[0].versions == ("Sure.", "A better answer.")
    assert made[0].critiques == (Critique(RULES[0], True, "Yes, it does."),)
    assert heard[0].startswith("System: The key is ") and heard[0].endswith("Critique:")
    assert RULES[0].critique in heard[0] and RULES[0].revision in heard[1] and "Assistant: Sure." in heard[1]


def test_a_model_that_finds_nothing_or_says_nothing_changes_nothing():
    for critique, revision in ((["No, all is well."], ["x"]), (["  "], ["x"]), (["Yes."], ["  "])):
        critic, _ = constitution.asked(lambda prompts, said=critique: said * len(prompts))
        _, reviser = constitution.asked(lambda prompts, said=revision: said * len(prompts))
        made = constitution.revise(secrets.hostile("train", 1), ["Sure."], RULES[:1], critic, reviser)
        assert made[0].versions == ("Sure.",)


def test_a_model_judges():
    said = iter([["Yes.", "no", "perhaps"]])
    judge = constitution.asked_to_judge(lambda prompts: next(said))
    assert judge(secrets.hostile("train", 3), ["a", "b", "c"], RULES) == [1.0, 0.0, 0.5]


def test_agreement():
    found, nothing = Critique(RULES[0], True, ""), Critique(RULES[0], False, "")
    assert constitution.agreement([found, found, nothing], [found, nothing, nothing]) == 2 / 3
    with pytest.raises(UserError, match="0 and 0"):
        constitution.agreement([], [])


def test_bad_input_is_refused():
    tasks, answers = _leaky(2)
    with pytest.raises(UserError, match="no principles"):
        constitution.revise(tasks, answers, [], CRITIC, constitution.to_truth)
    with pytest.raises(UserError, match="3 answers to 4 tasks"):
        constitution.revise(tasks, answers[:3], RULES, CRITIC, constitution.to_truth)
