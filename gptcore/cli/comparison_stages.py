"""What the verbs that learn from comparisons share: their arguments, settings, and the refusal of changed ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.align.comparisons import Stage
    from gptcore.models.schema import Spec


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("data", nargs="*", metavar="DATA", help="files of preferences or rankings")
    parser.add_argument("--config", metavar="FILE", help="settings as TOML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, such as adapter.rank=8"
    )
    parser.add_argument("--start", metavar="MODEL", help="a run, checkpoint or Hugging Face directory")
    parser.add_argument("--out", metavar="DIR", help=f"directory of the run ({out})")
    parser.add_argument("--epochs", type=float, metavar="X", help="passes over the data (1)")
    parser.add_argument("--steps", type=int, metavar="N", help="updates, instead of epochs")
    parser.add_argument("--lora", type=int, metavar="R", help="train a LoRA of this rank, and nothing else")
    parser.add_argument("--template", metavar="NAME", help="as for 'gptcore sft'")
    parser.add_argument("--resume", metavar="DIR", help="continue this run with the settings kept there")
    parser.add_argument(
        "--zero", type=int, choices=(0, 1, 2, 3), help="what torchrun's processes divide, as in train (0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress line and no MFU")


def tables(args: argparse.Namespace, stage: str, **own: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of training and of the stage that the arguments add up to; ``own``: of the stage, where not None."""
    from gptcore.align import stage_settings
    from gptcore.train.config import merge

    given = {"files": args.data or None, "epochs": args.epochs, "template": args.template, **own}
    options = {key: value for key, value in given.items() if value is not None}
    over: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    if args.zero is not None:
        over["parallel"] = {"zero": args.zero}
    if args.resume:
        if args.data or args.config or args.out or args.start or args.template or args.lora:
            raise UserError(
                "--resume takes the settings kept with the run; leave out DATA, --config, --out, --start, --lora and "
                "--template"
            )
        kept = stage_settings.kept(args.resume, stage)
        table, more = stage_settings.read(stage, None, args.set, over)
        table = merge({**kept.get("train", {}), "run_dir": args.resume}, table)
        return table, merge(merge(kept.get(stage, {}), options), more)
    for key, value in (("start", args.start), ("run_dir", args.out)):
        if value is not None:
            over[key] = value
    if args.lora is not None:
        over["adapter"] = {"kind": "lora", "rank": args.lora}
    return stage_settings.read(stage, args.config, args.set, {**over, stage: options})


def begin(args: argparse.Namespace, name: str, stage: Stage[Any], table: dict[str, Any], spec: Spec) -> None:
    """Refuse to continue a run with other settings by mistake, keep those of this one, and say what is learnt; of
    several processes the first one does."""
    from gptcore.align import stage_settings
    from gptcore.train import processes

    member = processes.member()
    if not args.resume:
        processes.first_alone(member, lambda: _refuse_changed(name, stage, spec))
    if member.rank:
        return
    stage_settings.keep(stage.config.run_dir, name, {"train": table, name: spec.to_dict()})
    if not args.quiet:
        print(f"to learn from: {stage.learnt}, held out: {len(stage.held_out)}; {stage.config.steps} updates")
        for reason, count in stage.skipped.items():
            print(f"left out: {count} ({reason})")


def _refuse_changed(name: str, stage: Stage[Any], spec: Spec) -> None:
    from gptcore.align import stage_settings
    from gptcore.cli import pipeline
    from gptcore.train.state import changes

    run_dir = stage.config.run_dir
    if not (Path(run_dir) / "config.json").is_file():
        return
    before = stage_settings.kept(run_dir, name).get(name, {})
    changed = changes(pipeline.kept_settings(run_dir).to_dict(), stage.config.to_dict())
    changed += changes(before, spec.to_dict(), f"{name}.")
    if changed:
        raise UserError(
            f"{run_dir} holds a run with other settings ({', '.join(changed)}); choose another --out, or continue "
            "that run with --resume"
        )
