"""The study from the first stage to the report: ``python -m bench secrets``.

What has ended is not run again, what was stopped goes on from its checkpoint, and the same settings give the same
numbers. Everything is made on this machine; one core takes about ten minutes for a seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.secrets import arms, stages
from bench.secrets.report import Report
from bench.secrets.settings import TOY, SecretsSpec
from bench.secrets.stages import Study
from gptcore.align.claim import claim
from gptcore.data.atomic import write_text
from gptcore.errors import UserError
from gptcore.train.config import merge, override

_RESULT = "result.json"
Say = Callable[[str], None]

EXAMPLES = """examples:
  python -m bench secrets                              the study, into runs/secrets
  python -m bench secrets --seeds 3 --json secrets.jsonl   three seeds, a record of each
  python -m bench secrets --toy --out /tmp/toy         is it all in place? half a minute, numbers of no worth
  python -m bench secrets --set beta=0.02 --out runs/secrets-loose
The command continues a study that was stopped. The last lines of the output are one JSON object for each seed.
"""


def run(directory: Path, spec: SecretsSpec, *, quiet: bool = False, say: Say = print) -> Report:
    """Do the whole study in ``directory``, or what is left of it, and write ``report.html`` there.

    Raises:
        UserError: a directory that holds something else, or a study with other settings.
        SystemExit: after SIGINT or SIGTERM, with 128 + signal; the same call goes on from there.
    """
    claim(directory, spec, "study")
    study, done = Study(directory, spec, quiet), {}

    def stage(name: str, work: Callable[[], dict[str, Any]], *, measured: bool = False) -> None:
        place = directory / name / _RESULT
        if not place.is_file():
            say(f"stage {name}")
            began = time.process_time()
            result = work()
            if measured:
                result["measured"] = stages.measure(study, name)
            place.parent.mkdir(exist_ok=True)
            write_text(place, json.dumps({**result, "cpu_seconds": time.process_time() - began}) + "\n")
        done[name] = json.loads(place.read_text(encoding="utf-8"))

    stage("pretrain", lambda: stages.pretrain(study))
    stage("start", lambda: stages.start(study), measured=True)
    stage("constitution", lambda: arms.revise(study), measured=True)
    stage("preferences", lambda: arms.prefer(study))
    stage("reward", lambda: arms.train_reward_model(study))
    stage("ppo", lambda: arms.reinforce(study), measured=True)
    report = Report(spec, done)
    report.write(directory)
    return report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench secrets", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--out",
        default="runs/secrets",
        metavar="DIR",
        help="one directory for each seed in it (runs/secrets)",
    )
    add("--seed", type=int, default=1, metavar="N", help="the first seed: of tasks, weights and samples (1)")
    add("--seeds", type=int, default=1, metavar="N", help="so many seeds, one after the other (1)")
    add("--toy", action="store_true", help="a toy size, to see that everything runs")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, such as beta=0.02")
    add("--json", metavar="FILE", help="also write the records to FILE, one JSON object a line")
    add("--quiet", action="store_true", help="no progress lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do the study for each seed; 0 when every line is met, 1 when one is not, 2 for a wrong option."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: expected at least 1")
    try:
        reports = [_one(arguments, seed) for seed in range(arguments.seed, arguments.seed + arguments.seeds)]
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    lines = [json.dumps(report.record()) for report in reports]
    if arguments.json:
        write_text(Path(arguments.json), "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if all(report.met for report in reports) else 1


def _one(arguments: argparse.Namespace, seed: int) -> Report:
    settings: dict[str, object] = {**(TOY if arguments.toy else {}), "seed": seed}
    for text in arguments.set:
        settings = merge(settings, override(text))
    place = Path(arguments.out) / f"seed-{seed}"
    report = run(place, SecretsSpec.from_dict(settings), quiet=arguments.quiet)
    print("\n".join(["", *report.lines(), f"report: {place / 'report.html'}", ""]))
    return report


if __name__ == "__main__":
    raise SystemExit(main())
