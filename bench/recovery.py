"""The detectors of spike recovery, their cost in an update and how often they are wrong: ``python -m bench.recovery``.

A small GPT trains at a rate of 0, in turns through ``gptcore.train.update`` alone and under the guard with full
windows. Who begins alternates, and each pair of turns gives one ratio of times, so that what slows the machine slows
both. Printed: the median over the pairs, and its one-sided 95% upper bound by order statistics, of wall time and of the
process's CPU time, which a busy neighbour disturbs less.

False alarms are counted over values drawn from distributions without spikes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from bench.bounds import median_and_bound
from gptcore import backend
from gptcore.dist import Member
from gptcore.models import GPT
from gptcore.train import TrainConfig, from_table, optimizers, update
from gptcore.train.evaluation import Batches
from gptcore.train.events import EventLog
from gptcore.train.guard import Guard, Window
from gptcore.train.recovery import guarded_update
from gptcore.train.recovery_changes import Course
from gptcore.train.recovery_spec import RecoverySpec
from gptcore.train.run_directory import RunDirectory
from gptcore.train.run_state import Run, writer_of
from gptcore.train.stop import StopRequest

MODEL = {
    "num_layers": 4,
    "width": 128,
    "context_length": 128,
    "vocab_size": 512,
    "attention": {"num_heads": 4},
}


class RandomLoader:
    """Tokens drawn anew for each index; the loss stays at its noise."""

    def batch_at(self, step: int) -> Batches:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(512, (4, 129), generator=generator)
        return type("Batch", (), {"tokens": rows[:, :-1].numpy(), "targets": rows[:, 1:].numpy()})


def settings(folder: str, policy: str) -> TrainConfig:
    """A rate of 0: weights and loss stay where they are, whichever way the updates go."""
    return from_table(
        {
            "run_dir": folder,
            "steps": 100_000,
            "model": MODEL,
            "data": {"batch": 4, "length": 128},
            "optimizer": {"lr": 0.0},
            "schedule": {"name": "constant", "warmup": 0},
            "recovery": {"loss": policy, "grad_norm": policy},
        }
    )


def sides(folder: str, policy: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The plain update and the guarded one, of the same model: two would lie in memory differently, for good."""
    config = settings(folder, policy)
    model, loader = GPT(config.model_config(), seed=0), RandomLoader()
    optimizer = optimizers.build(config.optimizer, model)
    place = RunDirectory(folder)
    course, guard, alone = Course(config), Guard(config.recovery), Member(None, 0, 1)
    now = Run(config, model, optimizer, loader, place, None, None, {}, course, guard, alone)
    now.called, now.events, now.writer = model, EventLog(place.events, 0), writer_of(now)
    stop, steps = StopRequest(), iter(range(config.steps))
    return (
        lambda: update(config, model, optimizer, loader, next(steps)),
        lambda: guarded_update(now, False, stop),
    )


def turn(step: Callable[[], object], updates: int) -> tuple[float, float]:
    """Seconds of so many updates: on the wall, and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(updates):
        step()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(policy: str, pairs: int, updates: int) -> dict[str, object]:
    """The guarded update over the plain one."""
    with tempfile.TemporaryDirectory() as folder:
        both = sides(folder, policy)
        for side in both:
            turn(side, 130)  # warm, and with full windows
        times = []
        for pair in range(pairs):
            order = (0, 1) if pair % 2 == 0 else (1, 0)
            times.append({side: turn(both[side], updates) for side in order})
    record: dict[str, object] = {"case": f"recovery/{policy}", "pairs": pairs}
    record["update_ms"] = round(1e3 * statistics.median(t[0][0] for t in times) / updates, 3)
    for clock, name in enumerate(("wall", "cpu")):
        ratios = [t[1][clock] / t[0][clock] for t in times]
        median, bound = median_and_bound(ratios)
        record[name], record[f"{name}_upper_95"] = round(median - 1, 5), round(bound - 1, 5)
    return record


def detectors_alone(updates: int = 20_000) -> dict[str, float | str]:
    """Microseconds that the detectors take for an update, windows full of noise."""
    guard = Guard(settings("unused", "rewind").recovery)
    noise = (3 + 0.1 * torch.randn(updates, generator=torch.Generator().manual_seed(0))).tolist()
    start = time.perf_counter()
    for step, value in enumerate(noise):
        guard.judge(step, value, value, guard.look(value, value))
    return {"case": "recovery/detectors", "us": round(1e6 * (time.perf_counter() - start) / updates, 2)}


def false_alarms(updates: int = 500_000) -> Iterator[dict[str, object]]:
    """Outliers, and three of them in a row, among values that have none but by chance."""
    spec, rng = RecoverySpec(), np.random.default_rng(0)
    draws = {
        "gaussian": rng.normal(3.0, 0.1, updates),
        "student, 4 degrees": 3.0 + 0.1 * rng.standard_t(4, updates),
        "lognormal, sigma 0.3": np.exp(rng.normal(0.0, 0.3, updates)),
    }
    for name, values in draws.items():
        window, streak = Window(spec.window, spec.least), 0
        outliers, spikes = 0, 0
        for value in values.tolist():
            streak = streak + 1 if window.outlier("", value, spec.threshold) is not None else 0
            outliers += streak > 0
            spikes += streak == spec.patience
            window.add(value)
        yield {"case": f"recovery/{name}", "updates": updates, "outliers": outliers, "spikes": spikes}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--updates", type=int, default=2, help="in each turn")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.pairs < 30:
        parser.error("--pairs: expected 30 or more")
    backend.set_num_threads(options.threads)
    for record in (*false_alarms(), detectors_alone()):
        print(json.dumps(record), flush=True)
    for policy in ("rewind", "skip"):
        print(json.dumps(compare(policy, options.pairs, options.updates)), flush=True)


if __name__ == "__main__":
    main()
