"""Tasks and rewards by name: a task of ``gptcore.align.tasks``, files of prompts, a function in a Python file."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar, NamedTuple

from gptcore.align.answers import Reward, by_answer
from gptcore.data import record_files
from gptcore.data.records import Task
from gptcore.errors import UserError, unknown_name
from gptcore.models.schema import Spec, at_least

_JUDGE = Callable[[Task, str], float]
BUILT_IN = ("arithmetic", "docstrings", "random_walks", "secrets")


@dataclass(frozen=True)
class TasksSpec(Spec):
    """What is asked and how answers are judged.

    ``path``: a task of gptcore.align.tasks by name, or JSONL, JSON or Parquet files with prompts (and what is right,
    ``truth``). ``held_out``: so many tasks are kept to measure on. ``reward`` and ``gold``, which is only logged:
    "task", the built-in task's own; "exact", 1 where the answer is the truth, white space at its ends aside;
    "FILE.py:FUNCTION" or "MODULE:FUNCTION", called with the task (``prompt``, ``truth``, ``extra``) and the answer's
    text; the directory of a run of 'gptcore reward', for its model's score. ``critic``: such a directory too, as whose
    model the critic begins. ``template``: "none", "plain", "chatml", a Jinja file or a model's directory; default what
    the model was kept with, or none.
    """

    section: ClassVar[str] = "tasks"

    path: str | tuple[str, ...] = "arithmetic"
    held_out: int = 256
    reward: str | None = None
    gold: str | None = None
    critic: str | None = None
    template: str | None = None

    def validate(self) -> None:
        at_least("tasks.", 0, held_out=self.held_out)


class Source(NamedTuple):
    """Tasks to learn from and to measure on; ``judge`` is the built-in task's own, None of files."""

    train: tuple[Task, ...]
    held_out: tuple[Task, ...]
    judge: _JUDGE | None


def tasks_of(spec: TasksSpec, seed: int) -> Source:
    """What ``spec`` names. Raises UserError where there is no such task or file, or nothing is left to learn from."""
    paths = [spec.path] if isinstance(spec.path, str) else list(spec.path)
    if paths[0] in BUILT_IN:
        return _built_in(paths[0], spec.held_out, seed)
    records = _read(paths, seed)
    if spec.held_out >= len(records):
        raise UserError(
            f"tasks.held_out: {spec.held_out} of the {len(records)} tasks, none is left to learn from"
        )
    return Source(tuple(records[spec.held_out :]), tuple(records[: spec.held_out]), None)


def measured_on(spec: TasksSpec, seed: int) -> Source:
    """As :func:`tasks_of` where nothing is learnt: of files, ``held_out`` tasks or all there are."""
    paths = [spec.path] if isinstance(spec.path, str) else list(spec.path)
    if paths[0] in BUILT_IN:
        return _built_in(paths[0], spec.held_out, seed)._replace(train=())
    return Source((), tuple(_read(paths, seed)[: spec.held_out]), None)


def _read(paths: Sequence[str], seed: int) -> list[Task]:
    """The tasks of files in an order drawn from ``seed``."""
    if len(paths) == 1 and not Path(paths[0]).exists() and not Path(paths[0]).suffix:
        raise unknown_name("task", paths[0], BUILT_IN)
    records = list(record_files.read(paths, Task).records)
    random.Random(f"held-out tasks {seed}").shuffle(records)
    return records


def _built_in(name: str, held_out: int, seed: int) -> Source:
    module = importlib.import_module(f"gptcore.align.tasks.{name}")
    if name == "arithmetic":
        parts = module.split(held_out, seed)
        return Source(parts.train, parts.held_out, module.reward)
    if name == "random_walks":  # every start is seen in training: what is measured is the way
        graph = module.graph()
        return Source(module.tasks(graph), module.tasks(graph), functools.partial(module.reward, graph))
    if name == "docstrings":
        return Source(module.tasks("train"), module.tasks("held_out")[:held_out], module.reward)
    train = module.benign("train", 2000, seed) + module.hostile("train", 2000, seed)
    random.Random(f"secrets {seed}").shuffle(train)
    count = (held_out + 1) // 2
    kept = module.benign("held_out", count, seed) + module.hostile("held_out", count, seed)
    return Source(tuple(train), tuple(kept), module.reward)


def reward_of(name: str | None, source: Source, what: str = "tasks.reward") -> Reward:
    """The reward that ``name`` means; None: the task's own, or "exact" for files."""
    if name is None:
        name = "exact" if source.judge is None else "task"
    if name == "task":
        if source.judge is None:
            raise UserError(f"{what}: 'task' is the reward of a built-in task; these come from files")
        return by_answer(source.judge)
    if name == "exact":
        _require_truth((*source.train, *source.held_out), what)
        return by_answer(exact)
    place, colon, function = name.rpartition(":")
    if not colon or not function.isidentifier():
        raise UserError(
            f"{what}: got {name!r}, expected 'task', 'exact', FILE.py:FUNCTION or MODULE:FUNCTION"
        )
    found = getattr(_module(place, what), function, None)
    if not callable(found):
        raise UserError(f"{what}: {place} has no function '{function}'")
    return by_answer(found)


def exact(task: Task, completion: str) -> float:
    """1 where the answer is the truth, white space at its ends aside."""
    return float(completion.strip() == str(task.truth).strip())


def _require_truth(tasks: Sequence[Task], what: str) -> None:
    missing = next((task for task in tasks if task.truth is None), None)
    if missing is not None:
        raise UserError(f"{what}: 'exact' needs the truth of every task; {missing.origin or 'one'} has none")


def _module(place: str, what: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise UserError(f"{what}: cannot import {place}: {error}") from None
    if not os.path.isfile(place):
        raise UserError(f"{what}: no file {place}")
    found = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
