"""Fine-tune a trained GPT on demonstrations: prompts and the responses to learn.

DATA is files of conversations, as JSONL, JSON or Parquet, also with .gz or .zst. The format is seen from the
keys: messages, conversations (ShareGPT), prompt and completion, instruction and output (Alpaca), question and
answer, text. Only responses are learnt, the token that ends them included.

--start names the model to begin with: a run, a checkpoint or a Hugging Face directory. Its chat template is
used, or else ChatML, whose two tokens are added to a vocabulary that lacks them; --template plain and none
need no new token. A tenth of the data is held out; the checkpoint with the lowest held-out loss is kept in
best/ of the run's directory.

Settings come from --config (TOML: the tables of 'gptcore train', and [sft]), then from the options, then from
--set. TRL's names are taken too, such as learning_rate and neftune_noise_alpha. docs/alignment.md explains
them. 'gptcore generate RUN/best --chat' asks the result.

The same command continues a run that was stopped; --resume continues it with the settings kept there.

Examples:
  gptcore sft --start runs/book questions.jsonl
  gptcore sft --start models/gpt2 alpaca.json --out runs/assistant --epochs 2 --set optimizer.lr=2e-5
  gptcore sft --start runs/book talk.parquet --template plain --set sft.neftune_alpha=5
  gptcore sft --config mixture.toml --set sft.mixture_cap=3000 --set sft.chain_of_thought=0.1
  gptcore sft --start models/gpt2 data.jsonl --set per_device_train_batch_size=4 --set max_length=1024
  gptcore sft --resume runs/assistant --epochs 4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.align.supervised import Stage
    from gptcore.train import Result

_STAGE = "sft"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="*", metavar="DATA", help="files of demonstrations")
    parser.add_argument("--config", metavar="FILE", help="settings as TOML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting, such as sft.packing=false",
    )
    parser.add_argument("--start", metavar="MODEL", help="a run, checkpoint or Hugging Face directory")
    parser.add_argument("--out", metavar="DIR", help="directory of the run (runs/sft)")
    parser.add_argument("--epochs", type=float, metavar="X", help="passes over the data (3)")
    parser.add_argument("--steps", type=int, metavar="N", help="updates, instead of epochs")
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="chatml, plain, none, a Jinja file or a model's directory (the model's own)",
    )
    parser.add_argument("--lora", type=int, metavar="R", help="train a LoRA of this rank, and nothing else")
    parser.add_argument("--resume", metavar="DIR", help="continue this run with the settings kept there")
    parser.add_argument(
        "--zero", type=int, choices=(0, 1, 2, 3), help="what torchrun's processes divide, as in train (0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress line and no MFU")


def run(args: argparse.Namespace) -> int:
    from gptcore.align import stage_settings, supervised
    from gptcore.align.supervised_spec import SFTSpec
    from gptcore.train import processes

    table, own = _continued(args) if args.resume else _configured(args)
    stage = supervised.prepare(table, SFTSpec.from_dict(own))
    config = stage.config
    with processes.started(config.device, config.parallel.timeout) as member:
        if not args.resume:
            processes.first_alone(member, lambda: _refuse_changed(stage))
        if member.rank == 0:
            kept = {"train": table, _STAGE: stage.spec.to_dict()}
            stage_settings.keep(config.run_dir, _STAGE, kept)
        if member.rank == 0 and not args.quiet:
            print(_opening(stage))
        result = supervised.train(stage, quiet=args.quiet or member.rank > 0, writes=member.rank == 0)
        if member.rank == 0:
            print(_closing(stage, result))
    return 0


def _configured(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of training and of the stage that the arguments add up to."""
    from gptcore.align import stage_settings

    over: dict[str, Any] = {_STAGE: _stage_options(args)}
    for key, value in (("start", args.start), ("run_dir", args.out), ("steps", args.steps)):
        if value is not None:
            over[key] = value
    if args.lora is not None:
        over["adapter"] = {"kind": "lora", "rank": args.lora}
    if args.zero is not None:
        over["parallel"] = {"zero": args.zero}
    return stage_settings.read(_STAGE, args.config, args.set, over)


def _continued(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the run to resume; its length alone may be given anew."""
    from gptcore.align import stage_settings
    from gptcore.train.config import merge

    if args.data or args.config or args.out or args.start or args.template or args.lora:
        raise UserError(
            "--resume takes the settings kept with the run; leave out DATA, --config, --out, --start, --lora and "
            "--template"
        )
    kept = stage_settings.kept(args.resume, _STAGE)
    over, own = stage_settings.read(
        _STAGE, None, args.set, {} if args.steps is None else {"steps": args.steps}
    )
    table = merge({**kept.get("train", {}), "run_dir": args.resume}, over)
    return table, merge(merge(kept.get(_STAGE, {}), _stage_options(args)), own)


def _stage_options(args: argparse.Namespace) -> dict[str, Any]:
    given = {"files": args.data or None, "epochs": args.epochs, "template": args.template}
    return {key: value for key, value in given.items() if value is not None}


def _refuse_changed(stage: Stage) -> None:
    """Keep a run's checkpoints from being continued, by mistake, with other data or settings."""
    from gptcore.align import stage_settings
    from gptcore.cli import pipeline
    from gptcore.train.state import changes

    run_dir = stage.config.run_dir
    if not (Path(run_dir) / "config.json").is_file():
        return
    before = pipeline.kept_settings(run_dir).to_dict()
    changed = changes(before, stage.config.to_dict())
    changed += changes(stage_settings.kept(run_dir, _STAGE).get(_STAGE, {}), stage.spec.to_dict(), "sft.")
    if changed:
        raise UserError(
            f"{run_dir} holds a run with other settings ({', '.join(changed)}); choose another --out, or continue "
            f"that run with 'gptcore sft --resume {run_dir}'"
        )


def _opening(stage: Stage) -> str:
    """What is learnt, and what was left out."""
    counts = ", ".join(f"{len(examples)} of {name}" for name, examples in stage.loader.tasks.items())
    lines = [f"examples: {counts}; {stage.loader.rows_per_epoch} rows an epoch, {stage.config.steps} updates"]
    lines += [f"left out: {count} ({reason})" for reason, count in stage.skipped.items()]
    return "\n".join(lines)


def _closing(stage: Stage, result: Result) -> str:
    """What the run came to, and what to do next."""
    numbers = "".join(f", {name} {value:.4f}" for name, value in result.evaluation.items())
    lines = [f"step {result.step}{numbers}", f"checkpoint: {result.checkpoint}"]
    if result.best is not None:
        lines.append(f"best by {stage.config.checkpoint.best}: {result.best}")
    place = stage.config.run_dir if result.best is None else result.best.parent
    chat = "" if stage.chat.template is None else " --chat"
    lines.append(f'next: gptcore generate {place}{chat} --prompt "..."')
    return "\n".join(lines)
