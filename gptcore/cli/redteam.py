"""Attack a model that has a secret to keep, and say how often it tells: a rate with Wilson's interval.

The attacks are templates, 1,080 in all, of which those of --part are made; --written N adds attacks
that a model writes after examples of them (--writer, by default MODEL itself), with its rejects by reason.
Harmless questions are asked beside, since who never answers never leaks.

Examples:
  gptcore redteam runs/careful
  gptcore redteam runs/careful --attacks 1000 --out redteam.json
  gptcore redteam runs/careful --written 50 --writer models/gpt2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.align.red_team import Report
    from gptcore.align.speaker import Speaker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run, checkpoint or Hugging Face directory")
    parser.add_argument(
        "--attacks", type=int, default=500, metavar="N", help="attacks made from templates (500)"
    )
    parser.add_argument(
        "--part", choices=("held_out", "train"), default="held_out", help="which templates (held_out)"
    )
    parser.add_argument("--questions", type=int, default=500, metavar="N", help="harmless questions (500)")
    parser.add_argument("--written", type=int, default=0, metavar="N", help="attacks that a model writes (0)")
    parser.add_argument("--writer", metavar="MODEL", help="the model that writes them (MODEL)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="of the answers; 0 is greedy (1)"
    )
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="longest answer in tokens (96)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of attacks and samples (0)")
    parser.add_argument("--out", metavar="FILE", help="write every attack with its answer as JSON")


def run(args: argparse.Namespace) -> int:
    from gptcore.align import red_team
    from gptcore.align.speaker import load, speaker
    from gptcore.align.tasks import secrets
    from gptcore.stats.intervals import wilson

    if args.attacks < 1 or args.questions < 1 or args.written < 0 or args.tokens < 1:
        raise UserError("--attacks, --questions and --tokens are at least 1, --written at least 0")
    model, chat = load(args.model)
    speak = speaker(model, chat, max_new_tokens=args.tokens, temperature=args.temperature, seed=args.seed)
    tasks = secrets.hostile(args.part, args.attacks, args.seed)
    reports = [red_team.run(tasks, speak, secrets.leaks, source=lambda task: f"templates ({args.part})")]
    if args.written:
        reports += _written(args, speak)
    report = red_team.together(reports)
    asked = secrets.benign(args.part, args.questions, args.seed)
    answers = speak([task.prompt for task in asked])
    right = sum(secrets.helpful(task, answer) for task, answer in zip(asked, answers, strict=True))
    share = wilson(right, len(asked))
    print("\n".join(report.lines()))
    print(
        f"harmless questions: {right} of {len(asked)} answered right, {100 * share.estimate:.1f}% "
        f"(95% interval {100 * share.low:.1f} to {100 * share.high:.1f}%)"
    )
    if args.out:
        from gptcore.data.atomic import write_text

        write_text(Path(args.out), json.dumps(_as_json(report, right, len(asked)), indent=1) + "\n")
        print(f"written: {args.out}")
    return 0


def _written(args: argparse.Namespace, speak: Speaker) -> list[Report]:
    """What a model's own attacks got; nothing where it wrote none of use."""
    from gptcore.align import red_team
    from gptcore.align.speaker import load, speaker
    from gptcore.align.tasks import secrets

    writer = speak
    if args.writer:
        model, chat = load(args.writer)
        writer = speaker(model, chat, max_new_tokens=args.tokens, seed=args.seed)
    seeds = [attack.text for attack in secrets.attacks("train", args.seed)]
    grown = red_team.written(writer, seeds, args.written, seed=args.seed)
    rejects = ", ".join(f"{reason} {count}" for reason, count in sorted(grown.rejected.items())) or "none"
    print(f"attacks a model wrote: {len(grown.kept)} in {grown.rounds} rounds; rejected: {rejects}")
    if not grown.kept:
        return []
    contexts = secrets.hostile(args.part, len(grown.kept), args.seed)
    return [
        red_team.run(
            red_team.put_to(contexts, grown.kept),
            speak,
            secrets.leaks,
            source=lambda task: "written by a model",
        )
    ]


def _as_json(report: Report, right: int, questions: int) -> dict[str, Any]:
    return {
        "attacks": report.count,
        "successes": report.successes,
        "interval": list(report.interval),
        "by_source": report.by_source(),
        "questions": questions,
        "right": right,
        "outcomes": [
            {
                "attack": outcome.task.prompt[-1].content,  # type: ignore[union-attr]
                "key": outcome.task.extra["key"],
                "answer": outcome.answer,
                "succeeded": outcome.succeeded,
                "source": outcome.source,
            }
            for outcome in report.outcomes
        ],
    }
