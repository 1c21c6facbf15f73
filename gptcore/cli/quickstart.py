"""Train a small GPT from nothing, without network, data or GPU, and let it write.

The text is what the running Python says about itself: the language reference, docstrings, comments. A
tokenizer is trained on it, then a GPT; held-out bits per byte are measured before and after, and a sample
is written. The number of steps is fixed before training starts, so that the same machine gives the same
result; a slow one takes fewer steps and says so.

Examples:
  gptcore quickstart                      about a minute and a half on two cores
  gptcore quickstart --short              a few seconds: is everything in place?
  gptcore quickstart --steps 5000         longer is better
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.train import Result, TrainConfig

_PROMPTS = ("The function returns", "If the argument is")


class _Size(NamedTuple):
    """What one run of quickstart does."""

    steps: int
    max_bytes: int | None  # of the corpus
    vocab_size: int
    evaluation_batches: int
    sample_tokens: int


_FULL = _Size(steps=1200, max_bytes=None, vocab_size=2048, evaluation_batches=40, sample_tokens=80)
_SHORT = _Size(steps=20, max_bytes=400_000, vocab_size=512, evaluation_batches=4, sample_tokens=20)

# Training is to take at most this long, so that corpus, tokenizer, evaluation, sample and plot fit into two
# minutes with it.
_BUDGET_SECONDS = 75.0
_TRIAL_STEPS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", help="directory of the run (the first free runs/quickstart-N)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help=f"updates, whatever they take ({_FULL.steps})")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of weights, batches and sample (1)")
    parser.add_argument(
        "--short", action="store_true", help="little text, few steps: a check that it all works"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress lines")


def run(args: argparse.Namespace) -> int:
    from gptcore import __version__, backend
    from gptcore.cli import pipeline

    began = time.monotonic()
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}, expected at least 1")
    size = _SHORT if args.short else _FULL
    directory = _directory(args.out)
    threads = backend.num_threads()
    print(f"gptcore {__version__}, {backend.isa()}, {threads} thread{'s' * (threads != 1)}; run: {directory}")
    data = _prepare(directory, size, args.quiet)
    config = _config(directory, data, size, args)
    if args.steps is None and not args.short:
        config = _within_budget(config)
    backend.reset_report()
    result = pipeline.train(config, quiet=args.quiet)
    _show_results(config, result)
    _show_samples(directory, size, args.seed)
    _show_fallbacks(backend.report())
    print(_NEXT.format(directory=directory, seconds=time.monotonic() - began))
    return 0


_NEXT = """
done in {seconds:.0f} s. Try next:
  gptcore generate {directory} --prompt "A list is" --temperature 0.7
  gptcore train --resume {directory} --steps 3000
  gptcore train quickstart your.txt --out runs/mine
  gptcore presets
  gptcore road                  from pretraining to a reward model and PPO, measured"""


def _directory(wanted: str | None) -> Path:
    """The directory asked for, which must be free, or the first free default."""
    if wanted is not None:
        path = Path(wanted)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is in use; choose another --out, or leave it out")
        return path
    number = 1
    while (path := Path("runs") / ("quickstart" if number == 1 else f"quickstart-{number}")).exists():
        number += 1
    return path


def _prepare(directory: Path, size: _Size, quiet: bool) -> Path:
    """The corpus of this machine's Python, tokenised, in the run's directory."""
    from gptcore.data.prepare import BUILTIN, prepare

    made = prepare(
        BUILTIN,
        directory / "data",
        vocab_size=size.vocab_size,
        val_fraction=0.05,
        max_bytes=size.max_bytes,
        quiet=quiet,
    )
    print(
        f"text: {sum(made.text_bytes.values()) / 1e6:.1f} MB in {sum(made.documents.values())} documents, "
        f"{made.tokens['train'] / 1e6:.2f}M tokens to train on ({made.seconds:.0f} s)"
    )
    return made.directory


def _config(directory: Path, data: Path, size: _Size, args: argparse.Namespace) -> TrainConfig:
    from gptcore import backend
    from gptcore.train import from_table

    # bf16 products are twice to six times faster where the processor has them, and emulated elsewhere
    fast_bf16 = backend.isa() in ("v4_bf16", "amx")
    steps = size.steps if args.steps is None else args.steps
    table: dict[str, Any] = {
        "run_dir": str(directory),
        "steps": steps,
        "seed": args.seed,
        "dtype": "bfloat16" if fast_bf16 else "float32",
        "model": {"preset": "quickstart"},
        "data": {"path": str(data), "batch": 4, "length": 256},
        "optimizer": {"lr": 1.5e-3, "betas": [0.9, 0.95]},
        "schedule": {"warmup": min(50, steps // 10)},
        "evaluation": {"every": max(steps // 4, 1), "batches": size.evaluation_batches},
        "checkpoint": {"every": 0, "keep_last": 1},
    }
    return from_table(table)


def _within_budget(config: TrainConfig) -> TrainConfig:
    """``config``, with fewer steps where this machine would take longer than the budget.

    A throwaway model takes the first steps: the number is known before training and its result does not
    depend on how fast the machine happens to be while it runs.
    """
    seconds = _seconds_per_step(config)
    fitting = int(_BUDGET_SECONDS / seconds) // 50 * 50
    if fitting >= config.steps:
        return config
    steps = max(fitting, 50)
    print(f"this machine takes {seconds:.2f} s for a step: {steps} steps instead of {config.steps}")
    return config.merged({"steps": steps, "evaluation": {"every": max(steps // 4, 1)}})


def _seconds_per_step(config: TrainConfig) -> float:
    """The median of a few forward and backward passes of a model like the one to train."""
    import torch

    from gptcore.models import GPT
    from gptcore.train.loop import DTYPES

    model = GPT(config.model_config(), dtype=DTYPES[config.dtype])
    shape = (config.data.batch, config.data.length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(1 + _TRIAL_STEPS):
        started = time.perf_counter()
        model(tokens, tokens).loss.backward()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one finds caches and buffers empty


def _show_results(config: TrainConfig, result: Result) -> None:
    """Held-out bits per byte before and after, and where things are."""
    from gptcore.train import metrics

    lines = metrics.read(Path(config.run_dir) / "metrics.jsonl")
    before = next(line for line in lines if line["kind"] == "evaluation")["val_bits_per_byte"]
    after = result.evaluation["val_bits_per_byte"]
    print(f"held-out bits per byte: {before:.3f} before, {after:.3f} after {result.step} steps")
    print(f"loss curve: {result.curve}\ncheckpoint: {result.checkpoint}")


def _show_samples(directory: Path, size: _Size, seed: int) -> None:
    """What the model writes, read back from its checkpoint."""
    from gptcore.infer import generate, load

    model, tokenizer = load(directory)
    for number, prompt in enumerate(_PROMPTS):
        result = generate(
            model, tokenizer, prompt, max_new_tokens=size.sample_tokens, seed=seed + number, temperature=0.7
        )
        print(f"\n--- sample ---\n{prompt}{result.text}")


def _show_fallbacks(report: dict[str, dict[str, int]]) -> None:
    """Which calls of the whole run did not go to a kernel; none are expected."""
    if not report:
        print("\nevery operation ran on gptcore's kernels, plain matrix products on torch's")
    for call, reasons in report.items():
        for reason, count in reasons.items():
            print(f"fallback to torch: {call}, {count} times ({reason})")
