"""The whole road of InstructGPT offline: pretraining, SFT, reward model, PPO, report.

The task is one that this machine makes: addition with the working shown. Demonstrations come from
somebody who is unsure when to carry, and more often wrong than right where the ones add to about ten;
a reward model learns from rankings of six answers each, in which a tenth of the grades are confused; PPO
learns from the reward model. Every stage is
measured on prompts whose pairs of numbers were never seen, against two controls: the fine-tuned model,
and the fine-tuned model trained on for as much compute as reward model and PPO took. Expert iteration on
the verifier stands beside.

The same command continues a road that was stopped; the same settings give the same numbers.

Examples:
  gptcore road                            the whole road
  gptcore road --fast                     a shorter one: is it all in place?
  gptcore road --seed 7 --out runs/road-7 --set beta=0.1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gptcore.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="where it happens (runs/road, or runs/road-fast)")
    parser.add_argument("--fast", action="store_true", help="fewer prompts and iterations")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of tasks, weights and samples (1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, such as beta=0.05"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress lines")


def run(args: argparse.Namespace) -> int:
    from gptcore.align.road import run as road
    from gptcore.align.road.settings import FAST, RoadSpec
    from gptcore.train.config import merge, override

    settings: dict[str, object] = {"seed": args.seed, **(FAST if args.fast else {})}
    for text in args.set:
        settings = merge(settings, override(text.removeprefix("road.")))
    spec = RoadSpec.from_dict(settings)
    directory = Path(args.out or ("runs/road-fast" if args.fast else "runs/road"))
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --out")
    began = time.monotonic()
    report = road.run(directory, spec, quiet=args.quiet)
    print("\n".join(["", *report.lines()]))
    print(f"\ndone in {time.monotonic() - began:.0f} s; report: {directory / 'report.html'}")
    return 0
