"""Demonstrations of critiques, revisions and judgements, from which a small model learns to read the constitution.

A large model has an opinion of an answer when it is asked; one of a million parameters must first be shown what
critiques look like. The words are those of :mod:`gptcore.align.constitution`, what is right those of
:func:`gptcore.align.tasks.secrets.broken`. How well a model learnt it is measured on its own answers
(:func:`gptcore.align.constitution.agreement`).
"""

from __future__ import annotations

import random

from gptcore.align import constitution
from gptcore.align.constitution import Critique
from gptcore.align.tasks import secrets
from gptcore.align.tasks.secrets import CONSTITUTION
from gptcore.data.records import Demonstration, Task
from gptcore.errors import UserError

# What a critique says of an answer that breaks the principle, and of one that does not.
FOUND = {
    "secrecy": "Yes, it gives the key away.",
    "helpfulness": "Yes, the question has no right answer.",
    "candour": "Yes, the refusal is not candid.",
}
NOTHING = "No."


def demonstrations(answers: int, seed: int = 0) -> list[Demonstration]:
    """Of ``answers`` drawn answers, good and bad, to questions and attacks of training: to each a critique and a
    judgement by a principle drawn, and a revision where that is broken; ``task`` names which of the three.

    Raises:
        UserError: fewer than 2 answers.
    """
    if answers < 2:
        raise UserError(f"secrets: got {answers} answers to criticise, expected at least 2")
    drawn = random.Random(f"secrets critic {seed}")
    half = answers // 2
    tasks = [*secrets.hostile("train", half, seed), *secrets.benign("train", answers - half, seed)]
    titles = [f"{title}." for title in secrets.topics().values()]
    made: list[Demonstration] = []
    for task in tasks:
        made += _feedback(task, _answer(task, titles, drawn), drawn)
    drawn.shuffle(made)
    return made


def _feedback(task: Task, answer: str, drawn: random.Random) -> list[Demonstration]:
    """What is said of one answer, by principles drawn for each."""
    broken = secrets.broken(task, answer)
    criticised, judged = drawn.choice(broken or CONSTITUTION), drawn.choice(CONSTITUTION)
    if drawn.random() < 0.5:  # as many critiques that find nothing
        criticised = drawn.choice(CONSTITUTION)
    critique = Critique(criticised, criticised in broken, FOUND[criticised.name])
    made = [
        Demonstration(
            constitution.critique_request(task, answer, criticised),
            critique.text if critique.found else NOTHING,
            task="critique",
        ),
        Demonstration(
            constitution.judgement_request(task, answer, judged),
            "No." if judged in broken else "Yes.",
            task="judgement",
        ),
    ]
    if critique.found:
        request = constitution.revision_request(task, answer, critique)
        made.append(Demonstration(request, str(task.truth), task="revision"))
    return made


def _answer(task: Task, titles: list[str], drawn: random.Random) -> str:
    """An answer to ``task``: right, wrong in some way, or to another question."""
    key = str(task.extra["key"])
    leak = f"Sure: {drawn.choice([key, key[::-1], ' '.join(key), '-'.join(key)])}."
    words = str(task.truth).split()
    words.pop(drawn.randrange(len(words)))
    if task.extra["kind"] == "hostile":
        half = f"Sure: {key[: len(key) // 2]}."
        ways = [secrets.obliging(task), leak, half, drawn.choice(titles), *secrets.DECLINES]
        return drawn.choices(ways, [4, 1, 1, 1, 3, 1, 1])[0]
    ways = [str(task.truth), drawn.choice(titles), " ".join(words) or "No.", leak, *secrets.DECLINES]
    return drawn.choices(ways, [5, 2, 1, 1, 1, 1, 1])[0]
