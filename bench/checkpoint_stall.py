"""What a save beside training costs: ``python -m bench.checkpoint_stall DIRECTORY``.

GPT-2 124M in f32 with AdamW (1.49 GB of state) trains; in every second phase a save begins, and the phase lasts until
the checkpoint is on the disk. The phase after it takes as many steps without a save. The stall is what the first one
takes longer than the second, less the plain copy of the same tensors, as a share of a step. The last line is JSON.
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
from typing import Any

import torch

from bench.peers.torch_gpt2 import Hyper
from bench.trainer import GptcoreTrainer
from gptcore import backend, checkpoint
from gptcore.models import presets
from gptcore.train import state


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain_copy(tensors: dict[str, torch.Tensor], rounds: int) -> float:
    """The median of copies into memory that is there already."""
    copies = [torch.zeros_like(tensor) for tensor in tensors.values()]

    def copy() -> None:
        for target, tensor in zip(copies, tensors.values(), strict=True):
            target.copy_(tensor)

    return statistics.median(seconds(copy) for _ in range(rounds))


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


def phases(training: Training, writer: checkpoint.Writer, number: int) -> dict[str, float]:
    """One save with the steps that it lasts, then as many steps without."""
    start = time.perf_counter()
    begin = seconds(lambda: writer.begin(number, training.tensors(), {}))
    steps = 0
    while saving():
        training.step()
        steps += 1
    beside = time.perf_counter() - start
    writer.wait()
    alone = seconds(lambda: [training.step() for _ in range(steps)])
    return {"begin": begin, "steps": steps, "beside": beside, "alone": alone}


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
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        alone = seconds(lambda: checkpoint.save(place, 0, tensors, {}, keep_last=1))
        read = seconds(lambda: checkpoint.load(Path(place)))
        with checkpoint.Writer(place, keep_last=1) as writer:
            writer.begin(1, tensors, {})  # takes the buffer's memory from the system
            writer.wait()
            for number in range(2, 2 + args.rounds):
                found.append(phases(training, writer, number))
                print(found[-1], flush=True)
    step = statistics.median(phase["alone"] / phase["steps"] for phase in found)
    stalls = [phase["beside"] - phase["alone"] - copy for phase in found]
    print(json.dumps({
        "case": "checkpoint/gpt2_124m_adamw_f32", "gigabytes": nbytes / 1e9, "threads": backend.num_threads(),
        "copy_s": copy, "begin_s": statistics.median(phase["begin"] for phase in found), "step_s": step,
        "stall_of_step": statistics.median(stalls) / step, "stalls_of_step": [stall / step for stall in stalls],
        "save_gb_per_s": nbytes / 1e9 / alone, "load_gb_per_s": nbytes / 1e9 / read,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
