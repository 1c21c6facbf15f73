"""Train a reward model on rankings: which of several answers to a prompt is better.

DATA is files of preferences, as JSONL, JSON or Parquet: chosen and rejected, or a prompt with ranked
answers. All pairs of a prompt come from one forward of each answer. --start names the model to begin with,
best one that was fine-tuned on demonstrations; it gets a head of one number. A tenth of the prompts is held
out; scores are normalised so that references (reward.references, or the best held-out answers) score 0 on
average.

--members trains an ensemble, each from another seed, and with reward.folds each without another part of the
prompts: what its members disagree on, it has not learnt.

Settings come from --config (TOML: the tables of 'gptcore train', [adapter] and [reward]), then from the
options, then from --set. TRL's names are taken too. docs/alignment.md explains them.

Examples:
  gptcore reward --start runs/sft comparisons.jsonl
  gptcore reward --start runs/sft nectar.parquet --out runs/judge --lora 8 --set reward.margin=0.5
  gptcore reward --start runs/sft comparisons.jsonl --members 3 --set reward.folds=3
  gptcore reward --resume runs/judge
  torchrun --nproc-per-node 2 -m gptcore reward --start runs/sft comparisons.jsonl --set data.accumulate=2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gptcore.cli import comparison_stages

if TYPE_CHECKING:
    from gptcore.align.comparisons import Stage
    from gptcore.align.rankings import Ranked
    from gptcore.align.reward_spec import RewardSpec
    from gptcore.train import Result

_STAGE = "reward"
_MEMBER = "member-"  # of an ensemble, in the run's directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    comparison_stages.add_arguments(parser, "runs/reward")
    parser.add_argument("--members", type=int, metavar="N", help="reward models of an ensemble (1)")


def run(args: argparse.Namespace) -> int:
    from gptcore.align.reward_spec import RewardSpec
    from gptcore.cli import pipeline

    table, own = comparison_stages.tables(args, _STAGE, members=args.members)
    spec = RewardSpec.from_dict(own)
    out = Path(table.get("run_dir", "runs/reward"))
    with pipeline.processes_of(table) as place:
        if args.resume or spec.members == 1:
            _train(args, table, spec, _member(out), place.rank == 0)
            return 0
        for member in range(spec.members):
            own_table = {**table, "run_dir": str(out / f"{_MEMBER}{member}")}
            _train(args, own_table, spec, member, place.rank == 0)
        if place.rank == 0:
            print(f"an ensemble: {out / _MEMBER}0 to {spec.members - 1}")
    return 0


def _member(run_dir: Path) -> int:
    """Which of an ensemble a run is."""
    number = run_dir.name.removeprefix(_MEMBER)
    return int(number) if number != run_dir.name and number.isdigit() else 0


def _train(
    args: argparse.Namespace, table: dict[str, Any], spec: RewardSpec, member: int, speaks: bool
) -> None:
    from gptcore.align import comparisons

    stage = comparisons.prepare_reward(table, spec, member=member)
    comparison_stages.begin(args, _STAGE, stage, table, spec)
    result = comparisons.train(stage, quiet=args.quiet or not speaks, writes=speaks)
    closing = _closing(stage, result)  # of all processes, since the weights may be divided
    if speaks:
        print(closing)


def _closing(stage: Stage[Ranked], result: Result) -> str:
    """How far the model agrees with held-out rankings, and where."""
    from gptcore.align.reward_model import RewardModel, agreement

    told = agreement(cast(RewardModel, stage.model), stage.held_out)
    lines = [
        f"step {result.step}, held-out pairs in the right order {told.accuracy:.3f} of {told.pairs}, "
        f"calibration error {told.calibration_error:.3f}"
    ]
    lines += [
        f"  better answer {part.low:+d} to {part.high:+d} tokens longer: {part.accuracy:.3f} of {part.pairs}"
        for part in told.by_length
    ]
    return "\n".join([*lines, f"checkpoint: {result.checkpoint}"])
