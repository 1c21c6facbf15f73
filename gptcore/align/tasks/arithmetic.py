"""Additions with the working shown, ones first: ``47+38=`` is answered ``7+8=15,4+3+1=8;85``.

Each step adds a column of digits and the carry where there is one; what follows the ``;`` is the answer. Demonstrations
have mistakes in them at a chosen rate, so that imitation alone stays below what a verifier can teach. Held-out prompts
share no pair of summands with those to train on, in either order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gptcore.data.records import Demonstration, Ranking, Task
from gptcore.errors import UserError

ALPHABET = "+,0123456789;="  # every character of prompts and completions, in code-point order
NEAR = range(8, 13)  # what the ones add to where demonstrators are unsure whether to carry
MALFORMED = 10.0  # the grade of a completion without an answer; beyond any number of wrong digits


class Split(NamedTuple):
    """Tasks to train on and tasks to measure on, which share no pair of summands."""

    train: tuple[Task, ...]
    held_out: tuple[Task, ...]


def split(held_out: int = 1500, seed: int = 0, digits: int = 2) -> Split:
    """All additions of two numbers of ``digits`` digits, in an order drawn from ``seed``.

    At least ``held_out`` of them (one more where a pair has two orders) are to measure on.

    Raises:
        UserError: ``digits`` not 1, 2 or 3, or no addition left to train on.
    """
    if not 1 <= digits <= 3:
        raise UserError(f"arithmetic: got {digits} digits, expected 1, 2 or 3")
    numbers = range(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    if not 0 <= held_out < len(numbers) ** 2 - 1:
        raise UserError(f"arithmetic: got held_out {held_out}, expected 0 to {len(numbers) ** 2 - 2}")
    drawn = random.Random(f"arithmetic split {seed}")
    pairs = [(a, b) for a in numbers for b in numbers if a <= b]
    drawn.shuffle(pairs)
    parts: tuple[list[Task], list[Task]] = ([], [])
    for a, b in pairs:
        part = parts[1] if len(parts[1]) < held_out else parts[0]
        part += [task(*both) for both in dict.fromkeys([(a, b), (b, a)])]
    for part in parts:
        drawn.shuffle(part)
    return Split(tuple(parts[0]), tuple(parts[1]))


def task(a: int, b: int) -> Task:
    """The addition of ``a`` and ``b``."""
    return Task(f"{a}+{b}=", truth=str(a + b), extra={"summands": (a, b)})


def _carry(total: int) -> int:
    return total // 10


def _wrong_carry(total: int) -> int:
    """One where there is nothing to carry, nothing where there is one."""
    return int(total < 10)


def working(a: int, b: int, *, carries: Callable[[int], int] = _carry) -> str:
    """The right completion: the columns from the ones up, then the sum.

    ``carries``: what somebody carries from a column that adds to so much, where that is not its tens.
    """
    columns: list[str] = []
    digits, carry, left, right = "", 0, a, b
    while left or right or not columns:
        total = left % 10 + right % 10 + carry
        columns.append(f"{left % 10}+{right % 10}{'+1' if carry else ''}={total}")
        left, right, carry = left // 10, right // 10, carries(total)
        digits = f"{total % 10 if left or right else total}{digits}"
    return f"{','.join(columns)};{digits}"


def answer(completion: str) -> str:
    """What a completion answers: what follows its last ``;``, or nothing where there is none."""
    _, mark, last = completion.rpartition(";")
    return last.strip() if mark else ""


def reward(task: Task, completion: str) -> float:
    """1 where the answer is the sum, digit for digit, else 0. The working is not judged."""
    return float(answer(completion) == task.truth)


def grade(task: Task, completion: str) -> float:
    """How far off a completion is: the wrong digits of its answer, :data:`MALFORMED` where it gives none."""
    given, truth = answer(completion), str(task.truth)
    if not given.isascii() or not given.isdigit() or len(given) > len(truth) + 1:
        return MALFORMED
    width = max(len(given), len(truth))
    return float(sum(x != y for x, y in zip(given.rjust(width), truth.rjust(width), strict=True)))


def corrupted(completion: str, mistakes: int, drawn: random.Random) -> str:
    """``completion`` with ``mistakes`` of its digits replaced by others."""
    characters = list(completion)
    places = [place for place, character in enumerate(characters) if character.isdigit()]
    for place in drawn.sample(places, min(mistakes, len(places))):
        characters[place] = drawn.choice([digit for digit in "0123456789" if digit != characters[place]])
    return "".join(characters)


def columns(count: int, seed: int = 0) -> list[str]:
    """``count`` texts to pretrain on: three to five columns of digits added, right, of no addition in particular."""
    drawn = random.Random(f"arithmetic columns {seed}")
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(drawn.randint(3, 5)):
            a, b, carry = drawn.randrange(10), drawn.randrange(10), drawn.randrange(2)
            parts.append(f"{a}+{b}{'+1' if carry else ''}={a + b + carry}")
        texts.append(",".join(parts))
    return texts


def demonstrations(
    tasks: Sequence[Task], count: int, noise: float = 0.6, slips: float = 0.15, seed: int = 0
) -> list[Demonstration]:
    """``count`` demonstrations of ``tasks`` in turn, by somebody who is unsure when to carry.

    Where the ones add to something :data:`NEAR` ten, a share ``noise`` of them carries wrongly: from a half on, what
    imitation copies is wrong even greedily. Of the others a share ``slips`` goes wrong in one of the ways of
    :func:`slipped`, which a model averages out.

    Raises:
        UserError: no tasks, or a share that is none.
    """
    _check_share("noise", noise)
    _check_share("slips", slips)
    if not tasks:
        raise UserError("arithmetic: there are no tasks to demonstrate")
    drawn = random.Random(f"arithmetic demonstrations {seed}")
    made = []
    for number in range(count):
        chosen = tasks[number % len(tasks)]
        a, b = chosen.extra["summands"]
        completion = working(a, b)
        if a % 10 + b % 10 in NEAR:
            if drawn.random() < noise:
                completion = working(a, b, carries=_wrong_carry)
        elif drawn.random() < slips:
            completion = slipped(a, b, drawn)
        made.append(Demonstration(chosen.prompt, completion, task="arithmetic"))
    return made


def slipped(a: int, b: int, drawn: random.Random) -> str:
    """A completion with one mistake: a wrong carry, a digit of ``a`` misread, or one of the sum."""
    kind = drawn.choice(("carry", "misread", "sum"))
    if kind == "carry":
        return working(a, b, carries=_wrong_carry)
    if kind == "misread":
        return working(int(corrupted(str(a), 1, drawn)), b)
    columns, _, total = working(a, b).rpartition(";")
    return f"{columns};{corrupted(total, 1, drawn)}"


def ranking(task: Task, answers: Iterable[str], noise: float, drawn: random.Random) -> Ranking | None:
    """``answers`` ranked by :func:`grade`, equal grades being ties; each grade is confused with a share ``noise``.

    A confused grade is that of another of the answers. Equal answers count once. None where nothing is preferred.
    """
    different = list(dict.fromkeys(answer for answer in answers if answer.strip()))
    grades = [grade(task, completion) for completion in different]
    told = [drawn.choice(grades) if drawn.random() < noise else own for own in grades]
    if len(set(told)) < 2:
        return None
    return Ranking(task.prompt, tuple(different), tuple(told))


def rankings(
    tasks: Sequence[Task], count: int, k: int = 6, noise: float = 0.1, seed: int = 0
) -> list[Ranking]:
    """``count`` rankings of ``k`` answers each to ``tasks`` in turn: the right one, one that carries
    wrongly, and others with 1 to 3 digits wrong.

    For rankings of a model's own answers see :func:`ranking`.

    Raises:
        UserError: no tasks, fewer than 2 answers, a share that is none.
    """
    _check_share("noise", noise)
    if not tasks or k < 2:
        raise UserError(f"arithmetic: got {len(tasks)} tasks and k {k}, expected tasks and k of at least 2")
    drawn = random.Random(f"arithmetic rankings {seed}")
    made: list[Ranking] = []
    number = 0
    while len(made) < count:
        chosen = tasks[number % len(tasks)]
        summands = chosen.extra["summands"]
        right = working(*summands)
        answers = dict.fromkeys([right, working(*summands, carries=_wrong_carry)])
        while len(answers) < k:
            answers[corrupted(right, drawn.randint(1, 3), drawn)] = None
        shuffled = drawn.sample(list(answers), k)
        number += 1
        if (made_now := ranking(chosen, shuffled, noise, drawn)) is not None:
            made.append(made_now)
    return made


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"arithmetic: got {name} {value}, expected 0 to 1")
