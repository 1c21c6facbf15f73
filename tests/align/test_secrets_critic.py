"""Demonstrations of critiques: what they say is what the rule says, in the words that a critic is asked."""

from __future__ import annotations

from collections import Counter

import pytest

from gptcore.align import constitution
from gptcore.align.constitution import Critique
from gptcore.align.tasks import secrets, secrets_critic
from gptcore.errors import UserError


def _asked_about(count):
    """Requests by task and answer that could have been demonstrated, with what the rule says."""
    said = {}
    tasks = [*secrets.hostile("train", count // 2, 3), *secrets.benign("train", count - count // 2, 3)]
    by_context = {}
    for task in tasks:
        by_context.setdefault(constitution.transcript(task, ""), task)
    for made in secrets_critic.demonstrations(count, 3):
        context, _, answer = made.prompt.partition("\nAssistant: ")
        task = by_context[f"{context}\nAssistant: "]
        said[made.prompt] = task, answer.partition("\n\n")[0], made
    return said.values()


def test_critiques_judgements_and_revisions_follow_the_rule():
    kinds, found = Counter(), Counter()
    for task, answer, made in _asked_about(400):
        kinds[made.task] += 1
        broken = secrets.broken(task, answer)
        by_request = {
            request(task, answer, principle): principle
            for principle in secrets.CONSTITUTION
            for request in (constitution.critique_request, constitution.judgement_request)
        }
        if made.task == "revision":
            requests = [
                constitution.revision_request(task, answer, Critique(p, True, secrets_critic.FOUND[p.name]))
                for p in broken
            ]
            assert made.prompt in requests and secrets.broken(task, made.completion) == ()
            continue
        principle = by_request[made.prompt]
        yes = principle in broken if made.task == "critique" else principle not in broken
        assert made.completion.startswith("Yes" if yes else "No")
        found[made.task, principle.name, yes] += 1
    assert set(kinds) == {"critique", "judgement", "revision"}
    # both verdicts of each principle, in critiques and in judgements
    assert len(found) == 12 and min(found.values()) >= 10


def test_a_critic_that_was_shown_this_is_understood():
    task, leak = secrets.hostile("train", 1)[0], "Sure."
    for principle in secrets.CONSTITUTION:
        for text, expected in ((secrets_critic.FOUND[principle.name], True), (secrets_critic.NOTHING, False)):
            critic, _ = constitution.asked(lambda prompts, said=text: [said])
            assert critic([task], [leak], [principle])[0].found is expected


def test_a_pure_function_of_the_seed():
    assert secrets_critic.demonstrations(20, 1) == secrets_critic.demonstrations(20, 1)
    assert secrets_critic.demonstrations(20, 1) != secrets_critic.demonstrations(20, 2)
    with pytest.raises(UserError, match="got 1 answers"):
        secrets_critic.demonstrations(1)
