"""What a save beside training costs: ``python -m bench.checkpoint_stall DIRECTORY``.

GPT-2 124M in f32 with AdamW (1.49 GB of state) trains. Two phases of as many steps make a pair: at the beginning of
one a save begins, which is over before the phase is, and the other one has none; they take turns in going first. The
stall is what the phase with the save takes longer, less a plain copy of the same tensors made beside every pair, as a
share of a step. Printed last, as JSON: the median over the pairs and its one-sided 95% upper bound by order statistics,
of wall time and of the process's processor time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.bounds import median_and_bound
from bench.peers.torch_gpt2 import Hyper
from bench.trainer import GptcoreTrainer
from gptcore import backend, checkpoint
from gptcore.models import presets
from gptcore.train import state

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class PlainCopy:
    """Copies of tensors into memory that is there already."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def make(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.copies[name].copy_(tensor)


class Training:
    def __init__(self, batch: int, length: int) -> None:
        self.trainer = GptcoreTrainer(presets.get("gpt2"), torch.float32, Hyper())
        self.batch = torch.randint(50257, (2, batch, length))
        self.step()

    def step(self) -> None:
        self.trainer.step(*self.batch)

    def tensors(self) -> dict[str, torch.Tensor]:
        return state.collect(self.trainer.model, self.trainer.optimizer)[0]


class Pair(NamedTuple):
    """Seconds by clock: of the phases with a save and without, and of the copy; of ``begin`` on the wall."""

    beside: dict[str, float]
    alone: dict[str, float]
    copy: dict[str, float]
    begin: float


def timed(call: Callable[[], object]) -> dict[str, float]:
    """Seconds by clock."""
    starts = {name: clock() for name, clock in CLOCKS.items()}
    call()
    return {name: clock() - starts[name] for name, clock in CLOCKS.items()}


class Bench:
    def __init__(self, training: Training, writer: checkpoint.Writer, steps: int) -> None:
        self.training, self.writer, self.steps = training, writer, steps
        self.copy = PlainCopy(training.tensors())
        self.saves = 0
        self.begins: list[float] = []
        self.late = 0  # saves that outlasted their phase

    def phase(self) -> None:
        for _ in range(self.steps):
            self.training.step()

    def phase_with_save(self) -> None:
        self.saves += 1
        self.begins.append(seconds(lambda: self.writer.begin(self.saves, self.training.tensors(), {})))
        self.phase()
        self.late += not self.writer.ended
        self.writer.wait()

    def pair(self) -> Pair:
        found = {}
        phases = [self.phase_with_save, self.phase]
        for phase in phases if self.saves % 2 else reversed(phases):
            found[phase] = timed(phase)
        copy = timed(lambda: self.copy.make(self.training.tensors()))
        return Pair(found[self.phase_with_save], found[self.phase], copy, self.begins[-1])


def summary(pairs: list[Pair], steps: int) -> dict[str, Any]:
    """Medians; the stall as a share of a step with its bound, by clock."""
    values: dict[str, Any] = {
        "pairs": len(pairs), "begin_s": statistics.median(pair.begin for pair in pairs),
    }  # fmt: skip
    for name in CLOCKS:
        step = statistics.median(pair.alone[name] for pair in pairs) / steps
        stalls = [(pair.beside[name] - pair.alone[name] - pair.copy[name]) / step for pair in pairs]
        median, bound = median_and_bound(stalls)
        copy = statistics.median(pair.copy[name] for pair in pairs)
        values |= {
            f"step_{name}_s": step, f"copy_{name}_s": copy, f"stall_{name}": median, f"stall_{name}_upper_95": bound,
        }  # fmt: skip
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="on the disk to be measured; a temporary directory in it is used")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2, help="of a phase; a save must be over in it")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    backend.tune_malloc()
    training = Training(args.batch, args.length)
    tensors = training.tensors()
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        save = timed(lambda: checkpoint.save(place, 0, tensors, {}, keep_last=1))
        load = seconds(lambda: checkpoint.load(Path(place)))
        with checkpoint.Writer(place, keep_last=1) as writer:
            bench = Bench(training, writer, args.steps)
            first = seconds(bench.phase_with_save)  # takes the buffer's memory from the system
            pairs = []
            for _ in range(args.pairs):
                pairs.append(bench.pair())
                print(pairs[-1], flush=True)
    print(json.dumps({
        "case": "checkpoint/gpt2_124m_adamw_f32", "gigabytes": nbytes / 1e9, "threads": backend.num_threads(),
        "phase_steps": args.steps, **summary(pairs, args.steps), "late": bench.late, "first_begin_s": bench.begins[0],
        "first_phase_s": first, "save_cpu_s": save["cpu"], "save_gb_per_s": nbytes / 1e9 / save["wall"],
        "load_gb_per_s": nbytes / 1e9 / load,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
