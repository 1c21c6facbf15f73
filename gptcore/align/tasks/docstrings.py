"""What a function does, in one line: the first lines of this Python's own docstrings, judged by rules of PEP 257.

A prompt is a signature as source has it, up to the opening quotes, so that a model pretrained on source knows where it
stands; the completion is the docstring's first line. Modules are held out whole: neither their functions nor their
source is trained on, so that bits per byte of their source measure what alignment costs.
"""

from __future__ import annotations

import ast
import functools
import os
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from gptcore.data.builtin_corpus import library_files, normalise
from gptcore.data.records import Demonstration, Ranking, Task
from gptcore.errors import UserError

Part = Literal["train", "held_out"]

LONGEST = 72  # characters of a line of documentation (PEP 8, "Maximum Line Length", for docstrings)
# Rule names, in the order of their share in the score.
RULES = ("one line", "phrase", "period", "length", "not a signature")
_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*\)")


class Function(NamedTuple):
    """A function of the standard library.

    module: dotted. name: qualified by its class. signature: a line from ``def`` to the colon. line: the first line of
    its docstring, empty where there is none.
    """

    module: str
    name: str
    signature: str
    line: str


@functools.lru_cache(maxsize=1)
def functions() -> tuple[Function, ...]:
    """Every function and method of the standard library, tests left out, in the order of files and lines; some 5 s."""
    found: list[Function] = []
    for name, source in library_files((".py",)):
        if not _package(name).isidentifier():
            continue  # what cannot be imported, such as config-3.11-x86_64-linux-gnu
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in old modules
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        found += _inside(tree, module, "")
    if not found:
        raise UserError("docstrings: the standard library of this Python has no source to read")
    return tuple(found)


def _inside(node: ast.AST, module: str, outer: str) -> Iterator[Function]:
    for child in getattr(node, "body", []):
        if isinstance(child, ast.ClassDef):
            yield from _inside(child, module, f"{outer}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = "async def" if isinstance(child, ast.AsyncFunctionDef) else "def"
            returns = f" -> {ast.unparse(child.returns)}" if child.returns else ""
            signature = f"{start} {child.name}({ast.unparse(child.args)}){returns}:"
            line = normalise(ast.get_docstring(child) or "").strip().split("\n")[0].strip()
            yield Function(module, outer + child.name, signature, line)


def _package(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def is_held_out(module: str, share: float, seed: int = 0) -> bool:
    """Whether ``module`` is to measure on. Submodules go with their package."""
    package = module.split(".")[0]
    return random.Random(f"docstrings {seed} {package}").random() < share


def tasks(part: Part, held_out: float = 0.15, seed: int = 0, longest_prompt: int = 160) -> tuple[Task, ...]:
    """A task for each function whose signature has at most ``longest_prompt`` characters, documented or not.

    ``truth`` is the real first line, empty where there is none; ``extra`` has ``module``, ``name`` and ``signature``.
    """
    made = []
    for function in functions():
        if is_held_out(function.module, held_out, seed) == (part == "held_out"):
            prompt = f'{function.signature}\n    """'
            if len(prompt) <= longest_prompt:
                extra = {
                    "module": function.module,
                    "name": function.name,
                    "signature": function.signature,
                }
                made.append(Task(prompt, function.line, extra))
    return tuple(made)


def rules(signature: str, line: str) -> dict[str, bool]:
    """Which of :data:`RULES` the docstring ``line`` keeps.

    One line, not empty; a phrase of two words or more that begins with a capital; ends in a period; at most
    :data:`LONGEST` characters; no signature, neither a call at its start nor the words of ``signature`` again.
    """
    text = line.strip()
    name = re.sub(r"^(async )?def ", "", signature).partition("(")[0]
    words = text.split()
    restated = _words(text) == _words(signature) or _words(text) == _words(name)
    return {
        "one line": bool(text) and "\n" not in text,
        "phrase": len(words) >= 2 and words[0][:1].isupper(),
        "period": text.endswith(".") and not text.endswith(".."),
        "length": 0 < len(text) <= LONGEST,
        "not a signature": bool(text) and not _SIGNATURE.match(text) and not restated,
    }


def reward(task: Task, completion: str) -> float:
    """The share of rules that ``completion`` keeps, 0 to 1."""
    kept = rules(task.extra["signature"], completion)
    return sum(kept.values()) / len(kept)


def correct(task: Task, completion: str) -> bool:
    """Whether ``completion`` keeps every rule."""
    return reward(task, completion) == 1.0


def about(task: Task, completion: str) -> bool:
    """Whether ``completion`` has a word of the signature, of four letters or more: what the rules do not ask for.

    Words count as the same up to their endings. A policy that says one lawful sentence to everything keeps all rules;
    this is where it shows.
    """
    names = {word[:5] for word in _words(task.extra["signature"]) if len(word) >= 4}
    return bool(names & {word[:5] for word in _words(completion) if len(word) >= 4})


def _words(text: str) -> list[str]:
    return [
        word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", text.replace("def ", ""))
    ]


def demonstrations(tasks: Sequence[Task]) -> list[Demonstration]:
    """The real first lines of those ``tasks`` that have one, lawful or not."""
    return [Demonstration(task.prompt, task.truth, task="docstrings") for task in tasks if task.truth]


def rankings(
    tasks: Sequence[Task], count: int, k: int = 4, noise: float = 0.1, seed: int = 0
) -> list[Ranking]:
    """``count`` rankings by :func:`reward` of ``k`` answers: the real line, another function's, and spoiled forms.

    ``noise``: the share of answers that are given the score of another of the k.

    Raises:
        UserError: fewer than two documented tasks, ``k`` not 2 to 7, a share that is none.
    """
    documented = [task for task in tasks if task.truth]
    if len(documented) < 2 or not 2 <= k <= 7 or not 0.0 <= noise <= 1.0:
        raise UserError(
            f"docstrings: got {len(documented)} documented tasks, k {k} and noise {noise}, expected 2 or more, 2 to 7 "
            "and 0 to 1"
        )
    drawn = random.Random(f"docstrings rankings {seed}")
    made: list[Ranking] = []
    for _ in range(100 * count):
        if len(made) == count:
            break
        task, other = drawn.sample(documented, 2)
        answers = list(dict.fromkeys(_answers(task, other)))
        answers = drawn.sample(answers, min(k, len(answers)))
        worth = [reward(task, answer) for answer in answers]
        told = [drawn.choice(worth) if drawn.random() < noise else own for own in worth]
        if len(answers) == k and len(set(told)) > 1:
            made.append(Ranking(task.prompt, tuple(answers), tuple(-value for value in told)))
    return made


def _answers(task: Task, other: Task) -> Iterator[str]:
    """The real line, lawful where that is easy, another's, and what the rules are against."""
    line = task.truth.rstrip(".")
    yield task.truth
    yield f"{line[:1].upper()}{line[1:]}."
    yield other.truth
    yield line
    yield f"{line} {other.truth} {line}"
    yield task.extra["signature"].removeprefix("async ").removeprefix("def ").rstrip(":")
    yield line.lower()
    yield f"{line}\n{other.truth}"


def texts(part: Part, held_out: float = 0.15, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Name (with slashes) and source of each file of the modules of ``part``: what to pretrain on, or to measure."""
    for name, source in library_files((".py",)):
        package = _package(name)
        if package.isidentifier() and is_held_out(package, held_out, seed) == (part == "held_out"):
            yield name, normalise(source)


def write_texts(directory: str | os.PathLike[str], part: Part, held_out: float = 0.15, seed: int = 0) -> int:
    """Write :func:`texts` as text files that ``gptcore prepare`` takes; returns the bytes written.

    Raises:
        UserError: the directory is there and not empty.
    """
    place = Path(directory)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} is in use; choose another directory")
    place.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, text in texts(part, held_out, seed):
        if text:
            data = f"{text}\n".encode()
            (place / f"{name.removesuffix('.py').replace('/', '.')}.txt").write_bytes(data)
            total += len(data)
    return total
