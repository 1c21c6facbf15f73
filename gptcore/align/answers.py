"""What is asked of a policy and what came back: prompts in a fixed order, answers, and the rewards they get."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gptcore.align.verifier import Job, Verifier
from gptcore.data.chat import Chat
from gptcore.data.examples import Tokenised
from gptcore.data.permutation import derive, permute
from gptcore.data.records import Task
from gptcore.errors import UserError
from gptcore.infer import Rollouts


class Answer(NamedTuple):
    """One response to one task.

    text: the response without what ends it. prompt_ids, response_ids: tokens, the stop token among the latter.
    stopped: it ended by itself; otherwise it was cut at the length limit.
    """

    task: Task
    text: str
    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    stopped: bool


Reward = Callable[[Sequence[Answer]], Sequence[float]]  # one number for each answer, the greater the better


def by_answer(function: Callable[[Task, str], float]) -> Reward:
    """A reward from a function of one task and the text of one response."""

    def reward(answers: Sequence[Answer]) -> list[float]:
        return [function(answer.task, answer.text) for answer in answers]

    return reward


def by_model(scores: Callable[[Sequence[Tokenised]], Tensor]) -> Reward:
    """A reward from what scores whole sequences, the ``scores`` of a reward model; its tokens must be the policy's."""

    def reward(answers: Sequence[Answer]) -> list[float]:
        whole = [Tokenised.of(answer.prompt_ids.tolist(), answer.response_ids.tolist()) for answer in answers]
        return [float(score) for score in scores(whole).tolist()]

    return reward


def by_verifier(verifier: Verifier, job_of: Callable[[Answer], Job]) -> Reward:
    """1 for an answer whose job passes in the sandbox of ``verifier``, else 0; its workers run many at a time."""

    def reward(answers: Sequence[Answer]) -> list[float]:
        return [float(verdict.passed) for verdict in verifier.run_many(map(job_of, answers))]

    return reward


def rewarded(reward: Reward, answers: Sequence[Answer], name: str = "reward") -> NDArray[np.float64]:
    """(B,) rewards of ``answers``. Raises UserError for another number of them, and for one that is not finite."""
    scores = np.asarray([float(score) for score in reward(answers)], dtype=np.float64)
    if len(scores) != len(answers):
        raise UserError(f"the {name} gave {len(scores)} numbers for {len(answers)} answers")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        answer = answers[bad[0]]
        raise UserError(
            f"the {name} is {scores[bad[0]]} for the answer {answer.text[:200]!r} to {_shown(answer.task)!r}, and not "
            f"finite for {len(bad)} of {len(answers)}; expected a finite number"
        )
    return scores


def _shown(task: Task) -> str:
    prompt = task.prompt
    return (prompt if isinstance(prompt, str) else prompt[-1].content)[-200:]


class Prompts:
    """Tasks with their token ids, in an order that a seed decides: each is seen once before any is seen again.

    Raises UserError for no tasks, and for a prompt that is empty or leaves no room for a response in the context.
    """

    def __init__(self, tasks: Sequence[Task], chat: Chat, *, room: int, seed: int = 0) -> None:
        """
        Args:
            chat: tokenizer and template; it also says what ends a response.
            room: most tokens of a prompt: the context less what is generated.
        """
        if not tasks:
            raise UserError("there are no tasks to learn from")
        self.tasks, self.chat, self.seed = list(tasks), chat, seed
        self.ids = [np.asarray(chat.prompt_ids(task.prompt), dtype=np.int32) for task in self.tasks]
        for place, (task, ids) in enumerate(zip(self.tasks, self.ids, strict=True)):
            where = task.origin or f"task {place}"
            if not len(ids):
                raise UserError(f"{where}: the prompt is empty")
            if len(ids) > room:
                raise UserError(
                    f"{where}: the prompt has {len(ids)} tokens, the context leaves room for {room}; shorten it or "
                    "lower max_new_tokens"
                )

    def at(self, first: int, count: int) -> list[int]:
        """The places of the ``count`` tasks from the ``first`` of the order on, which goes on for ever."""
        positions = np.arange(first, first + count)
        number = len(self.tasks)
        places = np.empty(count, np.int64)
        for epoch in np.unique(positions // number):
            now = positions // number == epoch
            places[now] = permute(positions[now] % number, number, derive(self.seed, int(epoch)))
        return places.tolist()

    def answers(self, rollouts: Rollouts, places: Sequence[int]) -> list[Answer]:
        """The responses of ``rollouts`` to the tasks ``places``."""
        found = []
        for i, place in enumerate(places):
            ids, stopped = rollouts.response(i), bool(rollouts.stopped[i])
            text = self.chat.tokenizer.decode(ids[:-1] if stopped else ids)
            found.append(Answer(self.tasks[place], text, rollouts.prompt(i), ids, stopped))
        return found


class Shaping(NamedTuple):
    """What is made of a reward before it is learnt from.

    clip: bound on its size; None: none. missing_end: subtracted where a response did not end by itself, or with
    ``replaces_reward`` put in the reward's place, negative. overlong_buffer: the last tokens before the limit, over
    which a penalty grows to ``overlong_penalty`` (DAPO's soft punishment, Yu et al. 2025, eq. 13).
    """

    clip: float | None = None
    missing_end: float = 0.0
    replaces_reward: bool = False
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0

    def shaped(self, scores: NDArray[np.float64], rollouts: Rollouts, limit: int) -> NDArray[np.float64]:
        """(B,) of ``scores`` (B,); ``limit`` is max_new_tokens."""
        shaped = scores if self.clip is None else scores.clip(-self.clip, self.clip)
        cut = ~rollouts.stopped
        worse = -self.missing_end if self.replaces_reward else shaped - self.missing_end
        shaped = np.where(cut, worse, shaped)
        if self.overlong_buffer:
            into = rollouts.response_lengths - (limit - self.overlong_buffer)
            shaped = shaped - self.overlong_penalty * (into / self.overlong_buffer).clip(0.0, 1.0)
        return shaped


def is_constant(scores: NDArray[np.float64]) -> bool:
    """Whether there is nothing to learn from: more than one reward, all equal up to rounding."""
    spread = float(scores.max() - scores.min())
    return len(scores) > 1 and spread <= 1e-12 * max(1.0, math.fabs(float(scores[0])))
