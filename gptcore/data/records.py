"""What alignment trains on, before it is tokens: messages, demonstrations, rankings, labels, tasks.

A *prompt* is a text or a sequence of messages. Records are frozen and checked as they are made: what could only
train a model wrongly (an empty response, a chosen answer equal to the rejected one) is a ``UserError`` that says
so; readers add the file and the line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from gptcore.errors import UserError, unknown_name

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. ``role``: system, user, assistant or tool; ``extra``: what else a template may want of it, such as
    ``tool_calls`` or ``name``."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise unknown_name("role", str(self.role), ROLES)
        if not isinstance(self.content, str):
            raise UserError(f"message of {self.role}: got {type(self.content).__name__}, expected text")

    def to_dict(self) -> dict[str, Any]:
        """As templates see it: ``role``, ``content`` and what is in ``extra``."""
        return {"role": self.role, "content": self.content, **self.extra}


Prompt = Union[str, tuple[Message, ...]]  # noqa: UP007  evaluated at run time, by Python 3.10 too


@dataclass(frozen=True)
class Demonstration:
    """A response to learn from (supervised fine-tuning).

    ``prompt`` and ``completion``; of a conversation with several turns to learn ``messages`` has them all, and the
    other two are what leads to the last one and that. ``weight`` multiplies the loss; ``task`` names the source in a
    mixture; ``tools`` are what a template is told of tools; ``origin`` is the file and line, for errors.
    """

    prompt: Prompt
    completion: str
    weight: float = 1.0
    task: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _freeze(self)
        if not _speaks(self.completion) and not any(m.extra.get("tool_calls") for m in self.messages[-1:]):
            raise UserError("the response is empty, expected text to learn")
        if not (isinstance(self.weight, (int, float)) and 0.0 < self.weight < math.inf):
            raise UserError(f"weight: got {self.weight!r}, expected a positive number")


@dataclass(frozen=True)
class Ranking:
    """K answers to one prompt, with ranks: the smaller is the better, equal ones are ties. A pair is K = 2.

    ``margin``: by how much the first answer should win, of a pair (Llama 2); None where nobody said.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    ranks: tuple[float, ...]
    margin: float | None = None
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _freeze(self)
        if len(self.answers) < 2:
            raise UserError(f"a ranking has K = {len(self.answers)} answers, expected at least 2 to compare")
        if len(self.ranks) != len(self.answers):
            raise UserError(f"a ranking has {len(self.answers)} answers and {len(self.ranks)} ranks")
        if not all(isinstance(rank, (int, float)) and math.isfinite(rank) for rank in self.ranks):
            raise UserError(f"ranks: got {list(self.ranks)}, expected finite numbers")
        if len(set(self.ranks)) == 1:
            raise UserError(
                f"all {len(self.answers)} answers have rank {self.ranks[0]:g}: nothing is preferred"
            )
        if any(not _speaks(answer) for answer in self.answers):
            raise UserError(
                f"answer {[_speaks(a) for a in self.answers].index(False)} is empty, expected text"
            )
        self._refuse_equal_answers()
        if self.margin is not None and not math.isfinite(self.margin):
            raise UserError(f"margin: got {self.margin}, expected a finite number")

    def _refuse_equal_answers(self) -> None:
        rank_of: dict[str, float] = {}
        for answer, rank in zip(self.answers, self.ranks, strict=True):
            if rank_of.setdefault(answer, rank) != rank:
                raise UserError(
                    "the chosen answer equals the rejected one"
                    if len(self.answers) == 2
                    else f"one answer stands at ranks {rank_of[answer]:g} and {rank:g}"
                )

    @property
    def chosen(self) -> str:
        """The best answer (the first of the best)."""
        return self.answers[min(range(len(self.ranks)), key=self.ranks.__getitem__)]

    @property
    def rejected(self) -> str:
        """The worst answer (the last of the worst)."""
        return self.answers[max(range(len(self.ranks)), key=lambda i: (self.ranks[i], i))]


@dataclass(frozen=True)
class Labelled:
    """One response and whether it is good (KTO)."""

    prompt: Prompt
    completion: str
    label: bool
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _freeze(self)
        if not _speaks(self.completion):
            raise UserError("the response is empty, expected text that the label is about")
        if not isinstance(self.label, bool):
            raise UserError(f"label: got {self.label!r}, expected true or false")


@dataclass(frozen=True)
class Stepwise:
    """A response in steps, each labelled right or wrong (process supervision)."""

    prompt: Prompt
    steps: tuple[str, ...]
    labels: tuple[bool, ...]
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _freeze(self)
        if not self.steps or len(self.steps) != len(self.labels):
            raise UserError(
                f"got {len(self.steps)} steps and {len(self.labels)} labels, expected as many of both"
            )
        if any(not _speaks(step) for step in self.steps):
            raise UserError("a step is empty, expected text that its label is about")
        if not all(isinstance(label, bool) for label in self.labels):
            raise UserError(f"labels: got {list(self.labels)}, expected true or false for each step")


@dataclass(frozen=True)
class Task:
    """A prompt whose answer a verifier can judge against ``truth``; ``extra`` has what else was given with it."""

    prompt: Prompt
    truth: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _freeze(self)
        if not self.prompt:
            raise UserError("the prompt is empty, expected text or messages")


Record = Union[Demonstration, Ranking, Labelled, Stepwise, Task]  # noqa: UP007


def text_of(prompt: Prompt) -> str:
    """A prompt in words: the text itself, or the contents of its messages, one paragraph each."""
    return prompt if isinstance(prompt, str) else "\n\n".join(message.content for message in prompt)


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages: a text is what a user says."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _speaks(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _freeze(record: Any) -> None:
    """Lists become tuples, so that records hash and nobody changes them behind a cache."""
    for name in ("prompt", "messages", "tools", "answers", "ranks", "steps", "labels"):
        value = getattr(record, name, None)
        if isinstance(value, Sequence) and not isinstance(value, (str, tuple)):
            object.__setattr__(record, name, tuple(value))
    if not isinstance(record.prompt, (str, tuple)):
        raise UserError(f"prompt: got {type(record.prompt).__name__}, expected text or messages")
    if isinstance(record.prompt, tuple) and not all(isinstance(m, Message) for m in record.prompt):
        raise UserError("prompt: expected text or a sequence of Message")
