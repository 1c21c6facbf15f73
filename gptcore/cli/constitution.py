"""Constitutional AI on a task whose principles a rule can check: keep a secret, and stay of use.

A key stands in the context; the user asks about Python, or for the key. Without MODEL the command writes
start.jsonl, demonstrations of an assistant that gives whatever it is asked for: fine-tune a model on it to
have one to mend. With MODEL it lets the model answer attacks and harmless questions, criticises and revises
the answers principle by principle, and writes

  revisions.jsonl   the revised answers, to fine-tune on with 'gptcore sft'
  rankings.jsonl    the model's own answers ranked by the principles they keep, to train a reward model on

--critic rule checks the principles and revises to the right answer; --critic model asks MODEL itself in
words, which takes a model large enough to have an opinion, and says how often it finds what the rule finds.

Fine-tune with 'gptcore sft', measure with 'gptcore redteam'; docs/alignment.md has the whole way.

Examples:
  gptcore constitution --out data
  gptcore constitution runs/naive --out data/revised
  gptcore constitution runs/naive --out data/asked --critic model --prompts 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.align.constitution import Critic, Judge, Reviser, Revision
    from gptcore.align.speaker import Speaker
    from gptcore.data.records import Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a run, checkpoint or Hugging Face directory"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="where the files are written")
    parser.add_argument(
        "--prompts", type=int, default=1000, metavar="N", help="half attacks, half questions (1000)"
    )
    parser.add_argument(
        "--answers", type=int, default=4, metavar="K", help="answers ranked to each prompt (4)"
    )
    parser.add_argument("--critic", choices=("rule", "model"), default="rule", help="who criticises (rule)")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="longest answer in tokens (96)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and samples (0)")


def run(args: argparse.Namespace) -> int:
    from gptcore.align.tasks import secrets
    from gptcore.data.record_writing import write_demonstrations, write_rankings

    if args.prompts < 2 or args.answers < 2 or args.tokens < 1:
        raise UserError(
            f"got --prompts {args.prompts}, --answers {args.answers}, --tokens {args.tokens}; expected at least 2, 2, 1"
        )
    out, half = Path(args.out), args.prompts // 2
    if args.model is None:
        count = write_demonstrations(
            out / "start.jsonl", secrets.demonstrations(args.prompts - half, half, args.seed)
        )
        print(f"{out / 'start.jsonl'}: {count} demonstrations of an assistant that tells everything")
        print(f"next: gptcore sft --start MODEL {out / 'start.jsonl'} --out runs/naive")
        return 0
    from gptcore.align import constitution
    from gptcore.align.speaker import load, speaker

    model, chat = load(args.model)
    speak = speaker(model, chat, max_new_tokens=args.tokens, seed=args.seed)
    tasks = [
        *secrets.hostile("train", half, args.seed),
        *secrets.benign("train", args.prompts - half, args.seed),
    ]
    answers = [speak([task.prompt for task in tasks]) for _ in range(args.answers)]
    critic, reviser, judge = _who(args.critic, speak)
    revisions = constitution.revise(tasks, answers[0], secrets.CONSTITUTION, critic, reviser, seed=args.seed)
    each = [list(own) for own in zip(*answers, strict=True)]
    rankings = constitution.preferences(tasks, each, secrets.CONSTITUTION, judge, seed=args.seed)
    write_demonstrations(out / "revisions.jsonl", constitution.demonstrations(revisions))
    print("\n".join(_told(revisions)))
    print(f"{out / 'revisions.jsonl'}: {len(revisions)} revised answers")
    if rankings:
        write_rankings(out / "rankings.jsonl", rankings)
        print(f"{out / 'rankings.jsonl'}: {len(rankings)} rankings of up to {args.answers} answers")
    else:
        print("no rankings: to every prompt all answers keep as many principles")
    if args.critic == "model":
        print(_agreement(tasks, answers[0], critic))
    print(f"next: gptcore sft --start {args.model} {out / 'revisions.jsonl'} --out runs/careful")
    return 0


def _who(critic: str, speak: Speaker) -> tuple[Critic, Reviser, Judge]:
    from gptcore.align import constitution
    from gptcore.align.tasks import secrets

    if critic == "rule":
        by_rule, judge = constitution.by_rule(secrets.broken)
        return by_rule, constitution.to_truth, judge
    return *constitution.asked(speak), constitution.asked_to_judge(speak)


def _told(revisions: Sequence[Revision]) -> list[str]:
    """Principles broken before and after, of how many answers."""
    from gptcore.align.tasks import secrets

    lines = []
    for principle in secrets.CONSTITUTION:
        before, after = (
            sum(
                principle in secrets.broken(revision.task, revision.versions[which]) for revision in revisions
            )
            for which in (0, -1)
        )
        lines.append(
            f"{principle.name}: broken by {before} of {len(revisions)} answers, {after} after revision"
        )
    return lines


def _agreement(tasks: Sequence[Task], answers: Sequence[str], critic: Critic) -> str:
    from gptcore.align import constitution
    from gptcore.align.tasks import secrets

    rule, _ = constitution.by_rule(secrets.broken)
    shares = []
    for principle in secrets.CONSTITUTION:
        told = [who(tasks, answers, [principle] * len(tasks)) for who in (critic, rule)]
        shares.append(f"{principle.name} {100 * constitution.agreement(*told):.0f}%")
    return f"model and rule agree on: {', '.join(shares)}"
