"""A character-level GPT of 0.8M parameters on TinyShakespeare: wall time and validation loss, three seeds.

The recipe of examples/recipes/shakespeare_char.py: 4 layers, 4 heads, width 128, T 64, batch 12, dropout 0, no
biases, 2,000 steps, warm-up 100, cosine from 3e-3 to 3e-4, beta2 0.99, weight decay 0.1, clip 1. First 90% of the
text train, last 10% are held out. All participants see the same batches, in turns of 100 steps, so that a
neighbour on the machine slows all of them. Compilation happens before the clock starts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import ROOT
from bench.case import OURS, Case, Cost, Measured, Target

if TYPE_CHECKING:
    from torch import Tensor

BATCH, LENGTH, STEPS, TURN = 12, 64, 2000, 100
WARM_UP, TOP_LR, LOW_LR = 100, 3e-3, 3e-4
EVALUATION_BATCHES = 200
SEEDS = (1, 2, 3)
DEFAULT_DATA = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


def learning_rate(step: int) -> float:
    """Linear warm-up, then cosine down to LOW_LR at the last step."""
    if step < WARM_UP:
        return TOP_LR * (step + 1) / (WARM_UP + 1)
    progress = (step - WARM_UP) / (STEPS - WARM_UP)
    return LOW_LR + 0.5 * (1.0 + math.cos(math.pi * progress)) * (TOP_LR - LOW_LR)


class Batches:
    """Batches that depend on nothing but seed and step; ``held_out`` are the evaluation batches."""

    def __init__(self, path: str | Path, seed: int) -> None:
        import torch

        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"shakespeare: cannot read {path} ({error.strerror}); name it with --data"
            ) from None
        alphabet = sorted(set(text))
        self.vocabulary = len(alphabet)
        index = {character: i for i, character in enumerate(alphabet)}
        ids = torch.tensor([index[character] for character in text])
        cut = int(0.9 * len(ids))
        generator = torch.Generator().manual_seed(seed)
        self._train, held_out = ids[:cut], ids[cut:]
        self._starts = torch.randint(cut - LENGTH - 1, (STEPS, BATCH), generator=generator)
        # The same evaluation batches for every seed, so that losses can be compared.
        fixed = torch.Generator().manual_seed(0)
        starts = torch.randint(len(held_out) - LENGTH - 1, (EVALUATION_BATCHES, BATCH), generator=fixed)
        self.held_out = [_windows(held_out, row) for row in starts]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets), each (BATCH, LENGTH) int64."""
        return _windows(self._train, self._starts[step])


def _windows(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    windows = ids[starts[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _participants(target: Target, vocabulary: int, seed: int) -> dict[str, Any]:
    from bench.peers.torch_gpt2 import GPT2Config, Hyper, TorchTrainer
    from bench.trainer import GptcoreTrainer
    from gptcore.models import presets

    hyper = Hyper(lr=TOP_LR, betas=(0.9, 0.99), weight_decay=0.1, max_norm=1.0)
    ours = presets.get("shakespeare-char", {"vocab_size": vocabulary})
    config = GPT2Config(vocabulary, LENGTH, layers=4, heads=4, width=128, bias=False)
    mode = "f32" if target.dtype == "float32" else "autocast"
    return {
        OURS: GptcoreTrainer(ours, target.torch_dtype, hyper, seed=seed),
        "torch_eager": TorchTrainer(config, mode, hyper, compiled=False, seed=seed),
        "torch_compiled": TorchTrainer(config, mode, hyper, compiled=True, seed=seed),
    }


def _train(trainers: dict[str, Any], batches: Batches) -> dict[str, float]:
    """Seconds that each participant needs for all steps, in turns."""
    for trainer in trainers.values():
        trainer.gradients(*batches.at(0))
        trainer.forget()
    seconds = dict.fromkeys(trainers, 0.0)
    for first in range(0, STEPS, TURN):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            for step in range(first, first + TURN):
                trainer.step(*batches.at(step), lr=learning_rate(step))
            seconds[name] += time.perf_counter() - start
    return seconds


def _measure(target: Target, note: Callable[[str], None]) -> Measured:
    samples: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for seed in SEEDS:
        batches = Batches(target.data or DEFAULT_DATA, seed)
        trainers = _participants(target, batches.vocabulary, seed)
        for name, seconds in _train(trainers, batches).items():
            held_out = [trainers[name].loss(*batch) for batch in batches.held_out]
            samples.setdefault(name, []).append(seconds)
            losses.setdefault(name, []).append(round(sum(held_out) / len(held_out), 4))
            note(f"seed {seed}: {name} {seconds:.1f} s, validation loss {losses[name][-1]:.4f}")
    medians = {name: sorted(values)[len(values) // 2] for name, values in losses.items()}
    return Measured(samples, {"validation_loss": losses, "median_validation_loss": medians})


def _flops(_element: int) -> Cost:
    parameters, layers, width = 804_096, 4, 128
    per_token = 6.0 * parameters + 12.0 * layers * width * LENGTH
    return Cost(per_token * BATCH * LENGTH * STEPS)


CASES = [
    Case(
        "shakespeare/char_L4_H4_C128_T64_B12/2000_steps", cost=_flops, repeats=len(SEEDS), quick=False,
        tokens=BATCH * LENGTH * STEPS, measure=_measure,
    )
]  # fmt: skip
