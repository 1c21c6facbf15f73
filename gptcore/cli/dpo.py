"""Learn from preferences without a reward model: DPO, IPO, KTO, ORPO or SimPO.

DATA is files of preferences, as JSONL, JSON or Parquet: chosen and rejected, ranked answers (whose best and
worst are taken), for KTO answers with a label. --start names the model to begin with, which is the
reference too: its log-probabilities are taken once, before the first update. With --lora it is the adapter
alone that trains.

Watched on held-out pairs are the loss, the rewards that the model implies, their margin and accuracy, and the
log-probabilities of the chosen answers: DPO often lowers those as well, and says so at the end.

Settings come from --config (TOML: the tables of 'gptcore train', [adapter] and [preference]), then from the
options, then from --set. TRL's names are taken too. docs/alignment.md explains them.

Examples:
  gptcore dpo --start runs/sft comparisons.jsonl
  gptcore dpo --start runs/sft comparisons.jsonl --loss simpo --set preference.gamma=1.0 --lora 16
  gptcore dpo --start runs/sft thumbs.jsonl --loss kto --out runs/kto
  gptcore dpo --resume runs/kto
  torchrun --nproc-per-node 2 -m gptcore dpo --start runs/sft comparisons.jsonl --set data.accumulate=2
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gptcore.cli import comparison_stages

if TYPE_CHECKING:
    from gptcore.train import Result

_STAGE = "preference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    comparison_stages.add_arguments(parser, "runs/dpo")
    parser.add_argument("--loss", metavar="NAME", help="dpo, ipo, kto, orpo or simpo (dpo)")


def run(args: argparse.Namespace) -> int:
    from gptcore.align import comparisons
    from gptcore.align.preference_spec import PreferenceSpec
    from gptcore.cli import pipeline

    table, own = comparison_stages.tables(args, _STAGE, loss_type=args.loss)
    spec = PreferenceSpec.from_dict(own)
    with pipeline.processes_of(table) as member:
        stage = comparisons.prepare_preferences(table, spec)
        comparison_stages.begin(args, _STAGE, stage, table, spec)
        result = comparisons.train(stage, quiet=args.quiet or member.rank > 0, writes=member.rank == 0)
        if member.rank == 0:
            print(_closing(result, stage.config.run_dir))
    return 0


def _closing(result: Result, run_dir: str) -> str:
    """What the run came to, and what to be wary of."""
    numbers = "".join(f", {name} {value:.4f}" for name, value in result.evaluation.items())
    lines = [f"step {result.step}{numbers}", f"checkpoint: {result.checkpoint}"]
    change = result.evaluation.get("chosen_change", 0.0)
    if change < 0.0:
        lines.append(
            f"note: the chosen answers fell by {-change:.2f} nats of log-probability against the start; a larger "
            "preference.beta, fewer epochs or --loss orpo hold them"
        )
    return "\n".join([*lines, f'next: gptcore generate {run_dir} --prompt "..."'])
