"""Say what a training run needs, by formula: bytes on each GPU, traffic, FLOPs, hours and cost.

CONFIG is the name of a preset ('gptcore presets' lists them) or a config file of 'gptcore train'. Nothing of
the model is allocated. A preset is planned in bf16 under AdamW, with rows of its context length, 512 of them
an update, each a leaf: a group of sequences that goes through forward and backward by itself. docs/plan.md
explains every line.

Without --gpus it shows the fewest that fit. Memory is what the device has unless --memory says less. Bytes
have decimal prefixes: 80G is 80e9; 80GiB is 80 x 2^30. The last line names the smallest number of GPUs and
stage of ZeRO that fit.

Examples:
  gptcore plan gpt2-xl --device A100-40
  gptcore plan gpt3-175b --gpus 1024 --memory 80G --batch 1536 --checkpointing block
  gptcore plan palm-540b --batch 2048 --device H200 --checkpointing block --offload optimizer
  gptcore plan gpt3-175b --device V100 --tflops 28 --tokens 300G --price 1.5
  gptcore plan my.toml --set optimizer.name=adamw_8bit --json
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.train import TrainConfig
    from gptcore.train.devices import Device
    from gptcore.train.planned_run import Run

_SEQUENCES = 512  # of an update, where a preset is planned
_TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, where nothing else says how long the run is
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a preset, or a config file as TOML")
    parser.add_argument("--gpus", type=int, metavar="N", help="show N of them (the fewest that fit)")
    parser.add_argument("--memory", metavar="BYTES", help="of each GPU, such as 80G (what the device has)")
    parser.add_argument("--device", default="H100", help="V100, A100-40, A100-80, H100, H200 or B200 (H100)")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences of an update")
    parser.add_argument("--length", type=int, metavar="T", help="tokens of a sequence")
    parser.add_argument(
        "--grain", type=int, metavar="N", help="sequences of a leaf (config: data.batch; preset: 1)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of weights and activations"
    )
    parser.add_argument(
        "--checkpointing",
        default="none",
        metavar="KIND",
        help="of activations: none, selective or block (none)",
    )
    parser.add_argument(
        "--offload",
        default="none",
        metavar="WHAT",
        help="to host memory: none, optimizer or parameters (none)",
    )
    parser.add_argument(
        "--no-fixed-tree", action="store_true", help="one running sum of gradients, not a tree"
    )
    parser.add_argument("--tokens", metavar="N", help="of the whole run, such as 300G (20 a parameter)")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation to reckon with (0.4)")
    parser.add_argument("--tflops", type=float, metavar="X", help="TFLOP/s of a GPU, in place of --mfu")
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU for an hour, in any currency")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting of the config"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from gptcore.cli import plan_report

    facts = plan_report.facts(args.config, *_planned(args))
    print(json.dumps(facts, indent=2) if args.json else plan_report.describe(facts))
    return 0


def _planned(args: argparse.Namespace) -> tuple[Run, Any]:
    """What is planned, and what is asked about it."""
    from gptcore.cli.plan_report import Question
    from gptcore.train import devices

    config = _config(args)
    run = _run_of(config, args)
    device = devices.device(args.device)
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus: expected 1 or more, got {args.gpus}")
    limit = device.memory if args.memory is None else parse_amount("--memory", args.memory)
    tokens = _tokens(config, run, args)
    dtype = args.dtype or config.dtype
    return run, Question(dtype, args.gpus, limit, device, _speed(args, device), args.mfu, tokens, args.price)


def _config(args: argparse.Namespace) -> TrainConfig:
    from gptcore import train as training
    from gptcore.models import presets

    path = Path(args.config)
    if path.suffix == ".toml" or path.is_file():
        return training.load(path, args.set)
    length = presets.get(args.config).context_length
    data = {"batch": 1, "accumulate": _SEQUENCES, "length": length}
    return training.from_table(
        {"model": {"preset": args.config}, "dtype": "bfloat16", "data": data}, args.set
    )


def _run_of(config: TrainConfig, args: argparse.Namespace) -> Run:
    """The config as a plan's run, with what the options change of it."""
    from gptcore.train.planned_run import Run

    data, dtype = config.data, args.dtype or config.dtype
    if config.parallel.strategy != "zero":
        raise UserError(
            f"parallel.strategy: plan counts zero, got {config.parallel.strategy}; set it to zero"
        )
    optimizer = config.optimizer
    if dtype == "float16":
        optimizer = replace(optimizer, split_master=None)  # which only bf16 has
    return Run(
        model=config.model_config(),
        optimizer=optimizer,
        element_bytes=4 if dtype == "float32" else 2,
        sequences=data.batch * data.accumulate if args.batch is None else args.batch,
        length=data.length if args.length is None else args.length,
        grain=config.grain if args.grain is None else args.grain,
        checkpointing=args.checkpointing,
        offload=args.offload,
        fixed_tree=config.parallel.in_fixed_tree and not args.no_fixed_tree,
    )


def _tokens(config: TrainConfig, run: Run, args: argparse.Namespace) -> float:
    """Of the whole run."""
    if args.tokens is not None:
        return parse_amount("--tokens", args.tokens)
    if Path(args.config).is_file():
        return float(config.steps) * run.tokens
    return float(_TOKENS_PER_PARAMETER) * run.parameters


def _speed(args: argparse.Namespace, device: Device) -> float:
    """FLOP/s of a device to reckon with."""
    if not 0.0 < args.mfu <= 1.0:
        raise UserError(f"--mfu: expected above 0, at most 1, got {args.mfu}")
    if args.tflops is None:
        return float(args.mfu * device.peak)
    if not 0.0 < args.tflops < math.inf:
        raise UserError(f"--tflops: expected above 0, got {args.tflops}")
    return float(args.tflops * 1e12)


def parse_amount(option: str, text: str) -> float:
    """``80G``, ``80GB``, ``80GiB``, ``1.5T``, ``3e11``: a number above 0 with a decimal or binary prefix.

    Raises:
        UserError: anything else, naming ``option``.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and not match[2]) or not float(match[1]) > 0:
        raise UserError(f"{option}: expected an amount above 0 such as 80G or 80GiB, got '{text}'")
    return float(match[1]) * (1024 if match[3] else 1000) ** _PREFIXES[match[2]]
