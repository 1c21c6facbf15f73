"""Constitutional AI (Bai et al. 2022): answers criticised and revised by written principles, and preferences from AI.

    revisions = revise(tasks, answers, CONSTITUTION, critic, reviser)
    sft on demonstrations(revisions), then a reward model on preferences(tasks, several_answers, CONSTITUTION, judge)

Who criticises, revises and judges is a function: a rule, where a principle can be checked (:func:`by_rule`), or a model
that is asked in the paper's words (:func:`asked`, :func:`asked_to_judge`). How often a model finds what a rule finds
is :func:`agreement`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from gptcore.align.speaker import Speaker
from gptcore.data.records import Demonstration, Ranking, Task, as_messages
from gptcore.errors import UserError


class Principle(Protocol):
    """A rule of a constitution: its name, what it says, and what is asked of critic and reviser."""

    @property
    def name(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def critique(self) -> str: ...
    @property
    def revision(self) -> str: ...


class Critique(NamedTuple):
    """What is wrong with an answer by one principle; ``found`` False: nothing is."""

    principle: Principle
    found: bool
    text: str


class Revision(NamedTuple):
    """An answer on its way: ``versions`` from the first to the last, ``critiques`` of all but the last, in turn."""

    task: Task
    versions: tuple[str, ...]
    critiques: tuple[Critique, ...]

    @property
    def revised(self) -> str:
        """The last version."""
        return self.versions[-1]


# Of several answers at once, so that a model is asked in batches: (tasks, answers, the principle of each).
Critic = Callable[[Sequence[Task], Sequence[str], Sequence[Principle]], Sequence[Critique]]
Reviser = Callable[[Sequence[Task], Sequence[str], Sequence[Critique]], Sequence[str]]
Judge = Callable[[Sequence[Task], Sequence[str], Sequence[Principle]], Sequence[float]]


def revise(
    tasks: Sequence[Task],
    answers: Sequence[str],
    principles: Sequence[Principle],
    critic: Critic,
    reviser: Reviser,
    *,
    rounds: int | None = None,
    seed: int = 0,
) -> list[Revision]:
    """Criticise and revise each answer ``rounds`` times, each time by a principle drawn, none twice before all were.

    An answer in which the critic finds nothing stays as it is. An empty revision is none. ``rounds``: default one for
    each principle.

    Raises:
        UserError: no principles, other numbers of answers than of tasks.
    """
    _check(tasks, answers, principles)
    drawn = random.Random(f"constitution {seed}")
    orders = [drawn.sample(list(principles), len(principles)) for _ in tasks]
    versions = [[answer] for answer in answers]
    critiques: list[list[Critique]] = [[] for _ in tasks]
    for number in range(len(principles) if rounds is None else rounds):
        chosen = [order[number % len(order)] for order in orders]
        found = critic(tasks, [own[-1] for own in versions], chosen)
        for own, critique in zip(critiques, found, strict=True):
            own.append(critique)
        places = [place for place, critique in enumerate(found) if critique.found]
        revised = reviser(
            [tasks[p] for p in places], [versions[p][-1] for p in places], [found[p] for p in places]
        )
        for place, text in zip(places, revised, strict=True):
            if text.strip():
                versions[place].append(text)
    return [
        Revision(task, tuple(own), tuple(told))
        for task, own, told in zip(tasks, versions, critiques, strict=True)
    ]


def demonstrations(revisions: Sequence[Revision], *, changed_only: bool = False) -> list[Demonstration]:
    """The last versions that are not empty, to imitate; ``changed_only``: only those a critic objected to."""
    return [
        Demonstration(revision.task.prompt, revision.revised, task="constitution")
        for revision in revisions
        if revision.revised.strip() and (len(revision.versions) > 1 or not changed_only)
    ]


def preferences(
    tasks: Sequence[Task],
    answers: Sequence[Sequence[str]],
    principles: Sequence[Principle],
    judge: Judge,
    *,
    per_answer: int | None = None,
    seed: int = 0,
) -> list[Ranking]:
    """AI preferences: the answers to each task ranked by what ``judge`` makes of them, the mean over principles.

    ``judge`` gives each answer a number by a principle, the greater the better. ``per_answer``: how many principles,
    drawn for each task, judge its answers (Bai et al. draw one); default all. Tasks whose answers are all judged alike
    teach nothing and are left out, as are equal answers.

    Raises:
        UserError: no principles, other numbers of answers than of tasks.
    """
    _check(tasks, answers, principles)
    drawn = random.Random(f"constitution preferences {seed}")
    asked: list[tuple[int, str, Principle]] = []
    for place, own in enumerate(answers):
        chosen = list(principles) if per_answer is None else drawn.sample(list(principles), per_answer)
        asked += [(place, text, p) for text in dict.fromkeys(own) if text.strip() for p in chosen]
    told = judge(
        [tasks[place] for place, _, _ in asked], [text for _, text, _ in asked], [p for _, _, p in asked]
    )
    worth: list[dict[str, float]] = [{} for _ in tasks]
    for (place, text, _), value in zip(asked, told, strict=True):
        worth[place][text] = worth[place].get(text, 0.0) + float(value)
    return [
        Ranking(task.prompt, tuple(own), tuple(-value for value in own.values()))
        for task, own in zip(tasks, worth, strict=True)
        if len(set(own.values())) > 1
    ]


def by_rule(broken: Callable[[Task, str], Sequence[Principle]]) -> tuple[Critic, Judge]:
    """Critic and judge that check: ``broken(task, answer)`` names the principles an answer breaks."""

    def critic(
        tasks: Sequence[Task], answers: Sequence[str], principles: Sequence[Principle]
    ) -> list[Critique]:
        told = []
        for task, answer, principle in zip(tasks, answers, principles, strict=True):
            found = any(other.name == principle.name for other in broken(task, answer))
            told.append(Critique(principle, found, f"It breaks this: {principle.text}" if found else ""))
        return told

    def judge(tasks: Sequence[Task], answers: Sequence[str], principles: Sequence[Principle]) -> list[float]:
        return [float(not critique.found) for critique in critic(tasks, answers, principles)]

    return critic, judge


def to_truth(tasks: Sequence[Task], answers: Sequence[str], critiques: Sequence[Critique]) -> list[str]:
    """A reviser that knows: the task's own right answer. What stands in for a model that is too small to revise."""
    return [str(task.truth) for task in tasks]


def asked(speaker: Speaker) -> tuple[Critic, Reviser]:
    """Critic and reviser that ask a model, in the form of Bai et al. 2022, section 3.1.

    A critique that begins with "no" finds nothing.
    """

    def critic(
        tasks: Sequence[Task], answers: Sequence[str], principles: Sequence[Principle]
    ) -> list[Critique]:
        said = [text.strip() for text in speaker(list(map(critique_request, tasks, answers, principles)))]
        return [
            Critique(principle, bool(text) and not text.lower().startswith("no"), text)
            for principle, text in zip(principles, said, strict=True)
        ]

    def reviser(tasks: Sequence[Task], answers: Sequence[str], critiques: Sequence[Critique]) -> list[str]:
        return [text.strip() for text in speaker(list(map(revision_request, tasks, answers, critiques)))]

    return critic, reviser


def asked_to_judge(speaker: Speaker) -> Judge:
    """A judge that asks a model whether an answer keeps a principle: "yes" is 1, "no" 0, anything else 1/2."""

    def judge(tasks: Sequence[Task], answers: Sequence[str], principles: Sequence[Principle]) -> list[float]:
        prompts = list(map(judgement_request, tasks, answers, principles))
        said = [text.strip().lower() for text in speaker(prompts)]
        return [1.0 if text.startswith("yes") else 0.0 if text.startswith("no") else 0.5 for text in said]

    return judge


def agreement(first: Sequence[Critique], second: Sequence[Critique]) -> float:
    """The share of critiques in which two critics both find something, or both nothing. Raises UserError for none."""
    if not first or len(first) != len(second):
        raise UserError(f"agreement: got {len(first)} and {len(second)} critiques, expected as many of both")
    return sum(a.found == b.found for a, b in zip(first, second, strict=True)) / len(first)


def critique_request(task: Task, answer: str, principle: Principle) -> str:
    """What a model is asked that criticises ``answer`` by ``principle``; what it says next is the critique."""
    return f"{transcript(task, answer)}\n\nCritique request: {principle.critique}\n\nCritique:"


def revision_request(task: Task, answer: str, critique: Critique) -> str:
    """What a model is asked that revises ``answer`` after ``critique``; what it says next is the revision."""
    return (
        f"{transcript(task, answer)}\n\nCritique: {critique.text}\n\nRevision request: "
        f"{critique.principle.revision}\n\nRevision:"
    )


def judgement_request(task: Task, answer: str, principle: Principle) -> str:
    """What a model is asked that judges whether ``answer`` keeps ``principle``; it begins with yes or no."""
    return f"{transcript(task, answer)}\n\nPrinciple: {principle.text}\nDoes the answer keep it? Yes or no:"


def transcript(task: Task, answer: str) -> str:
    """A task and its answer in words, each turn on a line of its own."""
    turns = [f"{message.role.capitalize()}: {message.content}" for message in as_messages(task.prompt)]
    return "\n".join([*turns, f"Assistant: {answer}"])


def _check(tasks: Sequence[Task], answers: Sequence[object], principles: Sequence[Principle]) -> None:
    if not principles:
        raise UserError("constitution: there are no principles, expected at least 1")
    if len(tasks) != len(answers):
        raise UserError(f"constitution: got {len(answers)} answers to {len(tasks)} tasks")
