"""Train a GPT, or continue a run.

WHAT is the name of a preset ('gptcore presets' lists them) and what to train on: text files, a directory
that 'gptcore prepare' made, or 'builtin', text found on this machine. Settings come from the preset, then
from --config, then from the other options, then from --set; docs/training.md explains them.

Under torchrun the processes share each update: its data.accumulate micro-batches are divided among them,
and --zero says what else is (docs/scaling.md). The bits are those of one process; --strategy ddp and fsdp2
are torch's ways, and its rounding.

--start begins with the weights of a trained model instead of random ones. With
--set model.moe.num_experts=8 the feed-forward layers of a dense model become experts, all copies at first.

A run lives in its directory: checkpoints, metrics.jsonl, loss.png, config.json. The same command
continues a run that was stopped; --resume continues it with the settings kept there.

What a run does about spikes and NaN is set by --set recovery.loss=rewind and the like, and told in its
events.jsonl; --change changes a run under way, --replay makes again what a log tells. docs/recovery.md
explains them.

Examples:
  gptcore train shakespeare-char shakespeare.txt --set data.tokenizer=characters
  gptcore train quickstart book.txt --out runs/book --steps 2000 --set optimizer.lr=1e-3
  gptcore train gpt2 prepared/ --set dtype=bfloat16 --set data.batch=4 --set data.length=512
  gptcore train --config my.toml --set steps=5000
  gptcore train --resume runs/book
  gptcore train --resume runs/book --change step=1200,lr=3e-5 --change step=1500,optimizer=sgd,lr=0.1
  torchrun --nproc-per-node 2 -m gptcore train gpt2 prepared --set data.accumulate=4 --zero 2
  gptcore train --start models/mixtral book.txt --out runs/tuned
  gptcore train --start runs/book book.txt --out runs/experts --set model.moe.num_experts=8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.train import Result, TrainConfig

_DEFAULT_PRESET = "quickstart"
_DEFAULT_LENGTH = 256  # tokens of a row, or the model's context where that is shorter
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".zst", ".gz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", metavar="WHAT", help="a preset, then files or directories")
    parser.add_argument("--config", metavar="FILE", help="settings as TOML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting, such as optimizer.lr=3e-4",
    )
    parser.add_argument("--out", metavar="DIR", help="directory of the run (runs/gpt)")
    parser.add_argument("--steps", type=int, metavar="N", help="updates (2000)")
    parser.add_argument("--resume", metavar="DIR", help="continue this run with the settings kept there")
    parser.add_argument(
        "--start",
        metavar="MODEL",
        help="begin with the weights of a run, checkpoint or Hugging Face directory",
    )
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="step=N,KEY=VALUE",
        help="change lr, lr_factor, max_norm, optimizer, loss_scale or the data after N updates",
    )
    parser.add_argument(
        "--replay", metavar="FILE", help="decide what this events.jsonl tells, and nothing else"
    )
    parser.add_argument(
        "--strategy",
        choices=("zero", "ddp", "fsdp2"),
        help="how torchrun's processes share an update: zero, with the bits of one process, or torch's own (zero)",
    )
    parser.add_argument(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        help="what torchrun's processes divide: 0 nothing, 1 states, 2 and gradients, 3 and weights (0)",
    )
    parser.add_argument(
        "--no-fixed-tree",
        action="store_true",
        help="add gradients as they come; the bits then depend on the number of processes",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress line and no MFU")


def run(args: argparse.Namespace) -> int:
    from gptcore.cli import pipeline
    from gptcore.train import processes

    if args.no_fixed_tree:
        args.set.insert(0, "parallel.fixed_tree=false")
    if args.strategy is not None:
        args.set.insert(0, f"parallel.strategy={args.strategy}")
    if args.zero is not None:
        args.set.insert(0, f"parallel.zero={args.zero}")
    config = _replayed(args, _continued(args) if args.resume else _configured(args))
    with processes.started(config.device, config.parallel.timeout) as member:
        if not args.resume:
            processes.first_alone(member, lambda: pipeline.refuse_changed_settings(config))
        result = pipeline.train(config, quiet=args.quiet or member.rank > 0, member=member)
        if member.rank == 0:
            print(_closing(config, result))
    return 0


def _configured(args: argparse.Namespace) -> TrainConfig:
    """The settings that the arguments add up to."""
    from gptcore import train as training
    from gptcore.models import presets

    preset, paths = _split(args.what)
    settings = list(args.set)
    if args.steps is not None:
        settings.insert(0, f"steps={args.steps}")
    if args.out is not None:
        settings.insert(0, f"run_dir={json.dumps(args.out)}")
    if paths:
        settings.insert(0, f"data.path={json.dumps(paths)}")
    if args.start is not None:
        if preset is not None:
            raise UserError(f"--start brings its own model; leave out '{preset}'")
        base = _started(args.start)
        return (
            training.from_table(base, settings)
            if args.config is None
            else training.load(args.config, settings, base)
        )
    if args.config is not None:
        if preset is not None:
            settings.insert(0, f"model.preset={json.dumps(preset)}")
        return training.load(args.config, settings)
    preset = preset or _DEFAULT_PRESET
    length = min(_DEFAULT_LENGTH, presets.get(preset).context_length)
    return training.from_table({"model": {"preset": preset}, "data": {"length": length}}, settings)


def _started(start: str) -> dict[str, Any]:
    """The settings that follow from the model to start with: its own, its tokenizer, a length that it takes."""
    from gptcore.infer import trained

    config = trained.load(start)[0].config
    length = min(_DEFAULT_LENGTH, config.context_length)
    tokenizer = str(trained.tokenizer_place(start))
    return {"start": start, "model": config.to_dict(), "data": {"length": length, "tokenizer": tokenizer}}


def _split(what: list[str]) -> tuple[str | None, list[str]]:
    """The preset, if the first word is one, and the paths. Raises UserError for a word that is neither."""
    from gptcore.models import presets

    if not what or what[0] == "builtin" or Path(what[0]).exists():
        return None, what
    if len(what) == 1 and (Path(what[0]).suffix in _TEXT_SUFFIXES or "/" in what[0]):
        raise UserError(f"no file or directory at '{what[0]}'")
    presets.describe(what[0])
    return what[0], what[1:]


def _continued(args: argparse.Namespace) -> TrainConfig:
    """The settings of the run to resume; only the length of the run may be given anew."""
    from gptcore.cli import pipeline

    if args.what or args.config or args.out or args.start:
        raise UserError(
            "--resume takes the settings kept with the run; leave out WHAT, --config, --out and --start"
        )
    config = pipeline.kept_settings(args.resume)
    steps = [] if args.steps is None else [f"steps={args.steps}"]
    return config.with_overrides([*steps, *args.set])


def _replayed(args: argparse.Namespace, config: TrainConfig) -> TrainConfig:
    """With the changes of the command line."""
    from gptcore.train import recovery_replay

    if not args.change and args.replay is None:
        return config
    return recovery_replay.replayed(config, args.replay, [recovery_replay.change_of(t) for t in args.change])


def _closing(config: TrainConfig, result: Result) -> str:
    """What the run came to, and what to do next."""
    loss = result.evaluation.get("val_loss")
    bits = result.evaluation.get("val_bits_per_byte")
    held_out = f", held out {loss:.4f} nats per token" if loss is not None else ""
    held_out += f", {bits:.4f} bits per byte" if bits is not None else ""
    lines = [f"step {result.step}{held_out}", f"checkpoint: {result.checkpoint}"]
    if result.curve is not None:
        lines.append(f"loss curve: {result.curve}")
    lines.append(f'next: gptcore generate {config.run_dir} --prompt "..."')
    return "\n".join(lines)
