"""Compare assistants: their answers to the same prompts, judged in pairs, as win rates and ratings.

Every model is asked the same held-out tasks, and a judge scores the answers: the task's own rule, the
truth, a function, or a reward model. Win rates stand beside those at equal lengths, ratings (Bradley and
Terry's) with intervals; of the task 'secrets' also helpful, honest and harmless, each for itself.

Examples:
  gptcore compare runs/sft runs/ppo --tasks arithmetic
  gptcore compare runs/naive runs/careful --tasks secrets --out compare.html
  gptcore compare runs/sft runs/dpo runs/ppo --tasks questions.jsonl --judge runs/reward
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.align.answers import Answer
    from gptcore.align.contest import Contest
    from gptcore.align.task_sources import Source
    from gptcore.report.html import Page
    from gptcore.stats.intervals import Interval

_SAMPLES = 3  # prompts shown with everybody's answer


class Contestant(NamedTuple):
    """A model's answers, with the judge's scores."""

    name: str
    answers: list[Answer]
    scores: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="runs, checkpoints or Hugging Face directories"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["secrets"], metavar="TASKS", help="a built-in task, or files (secrets)"
    )
    parser.add_argument("--judge", metavar="WHAT", help="task, exact, FILE.py:FUNCTION or a reward model")
    parser.add_argument("--prompts", type=int, default=500, metavar="N", help="held-out tasks asked (500)")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="longest answer in tokens (96)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="of the answers; 0 is greedy (1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of tasks and samples (0)")
    parser.add_argument("--out", metavar="FILE", help="write the comparison as one HTML file")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from gptcore.align import task_sources
    from gptcore.align.contest import Contest

    if len(args.models) < 2:
        raise UserError(f"give at least two models to compare, got {args.models[0]} alone")
    if args.prompts < 2 or args.tokens < 1:
        raise UserError("--prompts is at least 2, --tokens at least 1")
    paths = args.tasks[0] if args.tasks[0] in task_sources.BUILT_IN else tuple(args.tasks)
    source = task_sources.measured_on(task_sources.TasksSpec(path=paths, held_out=args.prompts), args.seed)
    found = [_answered(name, args, source) for name in args.models]
    contest = Contest(
        tuple(one.name for one in found),
        np.array([one.scores for one in found]),
        np.array([[len(answer.text) for answer in one.answers] for one in found], np.float64),
    )
    print("\n".join(_lines(contest, found)))
    if args.out:
        print(f"written: {_page(contest, found, args).write(Path(args.out))}")
    return 0


def _answered(name: str, args: argparse.Namespace, source: Source) -> Contestant:
    """What the model ``name`` answers, and what the judge says of it."""
    from gptcore.align.answers import Prompts
    from gptcore.align.best_of_n import best_of_n
    from gptcore.cli.reinforcement import chat_of, judge_of
    from gptcore.infer import SamplingParams, trained

    model, tokenizer = trained.load(name)
    chat = chat_of(tokenizer, name, None)
    prompts = Prompts(source.held_out, chat, room=model.config.context_length - args.tokens + 1)
    judge = judge_of(args.judge, source, chat.tokenizer, "--judge")
    params = SamplingParams(temperature=args.temperature, seed=args.seed)
    found = best_of_n(model, prompts, judge, 1, max_new_tokens=args.tokens, params=params)
    return Contestant(name, found.best, found.scores[:, 0].tolist())


def _lines(contest: Contest, found: Sequence[Contestant]) -> list[str]:
    """The comparison in words."""
    width = max(len(one.name) for one in found)
    lines = [f"{len(found[0].answers)} prompts; 95% intervals", ""]
    for row in contest.ratings():
        place = contest.names.index(row.name)
        mean, length = contest.scores[place].mean(), contest.lengths[place].mean()
        low, high = row.rating.low, row.rating.high
        lines.append(
            f"{row.name:{width}}  rating {row.rating.estimate:5.0f} [{low:.0f}, {high:.0f}]  score {mean:.3f}  "
            f"{length:.0f} characters"
        )
    lines.append("")
    for second, first in _pairs(contest):
        rate = contest.rate(first, second)
        lines.append(
            f"{contest.names[first]} beats {contest.names[second]}: {rate.raw.percent('%')}, at equal lengths "
            f"{rate.controlled.rate.percent('%')}"
        )
    for one in found if _tells_virtues(found) else ():
        shares = _virtues(one)
        lines.append(
            f"{one.name}: " + ", ".join(f"{name} {share.percent('%')}" for name, share in shares.items())
        )
    return lines


def _page(contest: Contest, found: Sequence[Contestant], args: argparse.Namespace) -> Page:
    """The comparison with plots and some of the answers."""
    from gptcore.report.html import Page

    page = Page("Assistants compared", subtitle=f"{len(found[0].answers)} prompts, 95% intervals")
    page.section("Ratings")
    ratings = contest.ratings()
    page.intervals([(row.name, *row.rating) for row in ratings], label="rating", reference=1000.0)
    page.table(["", "bootstrapped"], [[row.name, tuple(row.bootstrapped)] for row in ratings])
    page.section("Win rates")
    rows = [(first, second, contest.rate(first, second)) for second, first in _pairs(contest)]
    page.table(
        ["assistant", "against", "wins, ties half", "at equal lengths"],
        [[contest.names[a], contest.names[b], tuple(r.raw), tuple(r.controlled.rate)] for a, b, r in rows],
    )
    if _tells_virtues(found):
        page.section("Helpful, honest, harmless")
        for virtue in ("helpful", "honest", "harmless"):
            page.intervals([(one.name, *_virtues(one)[virtue]) for one in found], label=virtue)
    page.section("Answers")
    for place in range(min(_SAMPLES, len(found[0].answers))):
        for one in found:
            page.sample(one.answers[place].text, caption=f"prompt {place + 1}, {one.name}")
    page.settings({name: value for name, value in vars(args).items() if name not in ("verb", "run")})
    return page


def _pairs(contest: Contest) -> list[tuple[int, int]]:
    """Each two assistants, in the order given."""
    return list(itertools.combinations(range(len(contest.names)), 2))


def _tells_virtues(found: Sequence[Contestant]) -> bool:
    """Whether the tasks are those whose rules tell them: questions and attacks."""
    return {"benign", "hostile"} <= {answer.task.extra.get("kind") for answer in found[0].answers}


def _virtues(one: Contestant) -> dict[str, Interval]:
    from gptcore.align.virtues import virtues

    return virtues(one.answers)._asdict()
