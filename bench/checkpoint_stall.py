"""What a save beside training costs: ``python -m bench.checkpoint_stall DIRECTORY``.

GPT-2 124M in f32 with AdamW (1.49 GB of state) trains; in every second phase a save begins, and the phase lasts until
the checkpoint is on the disk. The phase after it takes as many steps without a save. The stall is what the first one
takes longer than the second, less the plain copy of the same tensors, as a share of a step. Beside it stands the same
in processor time, which other programs on the machine disturb less. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.peers.torch_gpt2 import Hyper
from bench.trainer import GptcoreTrainer
from gptcore import backend, checkpoint
from gptcore.models import presets
from gptcore.train import state

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(call: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def plain_copy(tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """The median of copies into memory that is there already, by clock."""
    copies = [torch.zeros_like(tensor) for tensor in tensors.values()]

    def copy() -> None:
        for target, tensor in zip(copies, tensors.values(), strict=True):
            target.copy_(tensor)

    return {
        name: statistics.median(seconds(copy, clock) for _ in range(rounds)) for name, clock in CLOCKS.items()
    }


class Training:
    def __init__(self, batch: int, length: int) -> None:
        self.trainer = GptcoreTrainer(presets.get("gpt2"), torch.float32, Hyper())
        self.batch = torch.randint(50257, (2, batch, length))
        self.step()

    def step(self) -> None:
        self.trainer.step(*self.batch)

    def tensors(self) -> dict[str, torch.Tensor]:
        return state.collect(self.trainer.model, self.trainer.optimizer)[0]


def saving() -> bool:
    return any(thread.name == "checkpoint" for thread in threading.enumerate())


class Phases(NamedTuple):
    """One save with the steps that it lasts, then as many steps without: seconds by clock."""

    begin: float
    steps: int
    beside: dict[str, float]
    alone: dict[str, float]


def phases(training: Training, writer: checkpoint.Writer, number: int) -> Phases:
    starts = {name: clock() for name, clock in CLOCKS.items()}
    begin = seconds(lambda: writer.begin(number, training.tensors(), {}))
    steps = 0
    while saving():
        training.step()
        steps += 1
    beside = {name: clock() - starts[name] for name, clock in CLOCKS.items()}
    writer.wait()
    starts = {name: clock() for name, clock in CLOCKS.items()}
    for _ in range(steps):
        training.step()
    return Phases(begin, steps, beside, {name: clock() - starts[name] for name, clock in CLOCKS.items()})


def summary(found: list[Phases], copy: dict[str, float]) -> dict[str, Any]:
    """Medians; the stall of every save as a share of a step, by clock."""
    values: dict[str, Any] = {"begin_s": statistics.median(phase.begin for phase in found)}
    for name in CLOCKS:
        step = statistics.median(phase.alone[name] / phase.steps for phase in found)
        stalls = [(phase.beside[name] - phase.alone[name] - copy[name]) / step for phase in found]
        values |= {f"step_{name}_s": step, f"copy_{name}_s": copy[name], f"stall_of_step_{name}": stalls}
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="on the disk to be measured; a temporary directory in it is used")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    backend.tune_malloc()
    training = Training(args.batch, args.length)
    tensors = training.tensors()
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    copy = plain_copy(tensors, 5)
    found: list[Phases] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        alone = seconds(lambda: checkpoint.save(place, 0, tensors, {}, keep_last=1))
        work = seconds(lambda: checkpoint.save(place, 0, tensors, {}, keep_last=1), time.thread_time)
        read = seconds(lambda: checkpoint.load(Path(place)))
        with checkpoint.Writer(place, keep_last=1) as writer:
            writer.begin(1, tensors, {})  # takes the buffer's memory from the system
            writer.wait()
            for number in range(2, 2 + args.rounds):
                found.append(phases(training, writer, number))
                print(found[-1], flush=True)
    print(json.dumps({
        "case": "checkpoint/gpt2_124m_adamw_f32", "gigabytes": nbytes / 1e9, "threads": backend.num_threads(),
        **summary(found, copy), "save_cpu_s": work, "save_gb_per_s": nbytes / 1e9 / alone,
        "load_gb_per_s": nbytes / 1e9 / read,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
