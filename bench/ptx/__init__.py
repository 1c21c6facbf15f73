"""What alignment costs, and what the pretraining mix saves of it: ``python -m bench ptx --seeds 5``.

Ouyang et al. 2022 (InstructGPT, section 4.2) found that PPO alone makes a model worse at what it knew, and that adding
gradients of the pretraining loss (PPO-ptx) mends that. Here a small GPT reads the source of this Python's library and
imitates first lines of docstrings (``gptcore.align.tasks.docstrings``); from that one start each seed walks two arms,
PPO and PPO-ptx, with equal updates, prompts and samples, both held at the same KL from the start by an adapted beta.
Bits per byte are measured on source of modules that nothing was trained on, the share of answers that keep every rule
on signatures from there. Printed, and kept as ``records.jsonl`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

EXAMPLES = """examples:
  python -m bench ptx --seeds 5                                the study; given again it goes on where it was stopped
  python -m bench ptx --seeds 2 --set iterations=20 --out runs/ptx-short
  python -m bench ptx --set gamma=0.3 --out runs/ptx-gamma     another weight of the pretraining loss
"""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every claim holds, 1 when one does not, 2 for a wrong option."""
    from bench.ptx import report, study
    from bench.ptx.settings import PtxSpec
    from gptcore.errors import UserError

    parser = argparse.ArgumentParser(
        prog="python -m bench ptx", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (5)")
    parser.add_argument("--first", type=int, default=1, metavar="SEED", help="the first of them (1)")
    parser.add_argument("--out", default="runs/ptx", metavar="DIR", help="(runs/ptx)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="one setting of PtxSpec"
    )
    parser.add_argument("--progress", action="store_true", help="a progress line of each stage")
    arguments = parser.parse_args(argv)
    try:
        spec = PtxSpec.from_dict(dict(_setting(text) for text in arguments.set))
        seeds = range(arguments.first, arguments.first + arguments.seeds)
        records = study.run(arguments.out, spec, seeds, quiet=not arguments.progress, say=_say)
    except UserError as error:
        parser.error(str(error))
    print("\n".join(["", *report.told(records[-1])]))
    return 0 if all(claim["holds"] for claim in records[-1]["claims"]) else 1


def _say(text: str) -> None:
    print(text, flush=True)


def _setting(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value as JSON has it."""
    from gptcore.errors import UserError

    name, equals, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        what = f"got {value!r}" if equals else "got no value"
        raise UserError(
            f"--set {text}: {what}, expected NAME=VALUE with a number or a list of numbers"
        ) from None
