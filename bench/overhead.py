"""What sharding costs beside torch's DistributedDataParallel, in pairs of steps that alternate in the same processes.

    python -m bench.overhead                                   all settings, GPT-2's width with 4 layers
    python -m bench.overhead --pairs 40 --setting zero1
    python -m bench.overhead --processes 4 --dtype bfloat16

Each setting is met with the one it is measured against, step by step, first one and then the other in front. A pair's
figure is the ratio of their times; printed are the median, the mean and the upper end of the mean's 95% interval
(Student's t), and last one JSON object for each setting.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as c10d
import torch.multiprocessing as multiprocessing

Step = Callable[[], None]

# By name: what it is measured against, and what it adds.
SETTINGS = {
    "zero1": ("ddp", "ZeRO-1 with the fixed tree, against DistributedDataParallel with the whole optimizer"),
    "zero2": ("ddp", "ZeRO-2, against the same"),
    "zero3": ("ddp", "ZeRO-3, against the same"),
    "tree": ("loose", "ZeRO-1 over 4 leaves a process in the fixed tree, against adding them as they come"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="may be repeated (all)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="on this machine (2)")
    parser.add_argument("--pairs", type=int, default=30, metavar="N", help="of steps (30)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of a GPT of width 768 (4)")
    parser.add_argument(
        "--rows", type=int, default=2, metavar="N", help="sequences of 512 tokens in a leaf (2)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    # One thread a process: more would share cores.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.processes))
    multiprocessing.spawn(_process, args=(args,), nprocs=args.processes)


def _process(rank: int, args: argparse.Namespace) -> None:
    from gptcore import backend

    backend.tune_malloc()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    c10d.init_process_group("gloo", rank=rank, world_size=args.processes)
    records = []
    for name in args.setting or SETTINGS:
        peer, what = SETTINGS[name]
        ratios, ours, theirs = _alternate(_step_of(name, args), _step_of(peer, args), args.pairs)
        records.append(_record(name, peer, ratios, ours, theirs, args))
        if rank == 0:
            r = records[-1]
            print(f"{name}: {what}\n  {r['ms']:.0f} ms, {peer} {r['peer_ms']:.0f} ms; ratio median {r['median']:.3f}, "
                  f"mean {r['mean']:.3f}, at most {r['upper']:.3f} (95%)", flush=True)  # fmt: skip
    if rank == 0:
        for record in records:
            print(json.dumps(record))
    c10d.destroy_process_group()


def _step_of(setting: str, args: argparse.Namespace) -> Step:
    """One update of a model of its own under a setting."""
    from gptcore.models import GPT, GPTConfig
    from gptcore.optim import AdamW, ZeroOptimizer, decay_groups

    torch.manual_seed(0)
    config = GPTConfig.from_dict({"num_layers": args.layers, "vocab_size": 50304, "context_length": 512})
    model = GPT(config, seed=0, dtype=getattr(torch, args.dtype))
    tokens = torch.randint(50304, (args.rows, 513))
    optimizer: Any = AdamW(decay_groups(model, 0.1), lr=1e-4, max_norm=1.0)
    module: Any = model
    leaves = 4 if setting in ("tree", "loose") else 1
    if setting == "ddp":
        module = torch.nn.parallel.DistributedDataParallel(model)
    else:
        stage = int(setting[4:]) if setting.startswith("zero") else 1
        optimizer = ZeroOptimizer(
            optimizer, stage=stage, module=model, accumulation=leaves, fixed_tree=setting != "loose"
        )

    def step() -> None:
        for _ in range(leaves):
            module(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _alternate(ours: Step, theirs: Step, pairs: int) -> tuple[list[float], float, float]:
    """Ratios of the pairs, and the median seconds of both; a pair's time is that of the slowest process."""
    times: dict[Step, list[float]] = {ours: [], theirs: []}
    for _ in range(3):
        ours()
        theirs()
    for pair in range(pairs):
        for step in (ours, theirs) if pair % 2 else (theirs, ours):
            c10d.barrier()
            begin = time.perf_counter()
            step()
            took = torch.tensor(time.perf_counter() - begin)
            c10d.all_reduce(took, op=c10d.ReduceOp.MAX)
            times[step].append(float(took))
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    return ratios, statistics.median(times[ours]), statistics.median(times[theirs])


def _record(
    name: str, peer: str, ratios: list[float], ours: float, theirs: float, args: argparse.Namespace
) -> dict[str, Any]:
    mean = statistics.fmean(ratios)
    # t of 95% one-sided for 30 pairs and more is between 1.70 and 1.645.
    upper = mean + 1.70 * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return {
        "case": f"overhead/{name}", "against": peer, "dtype": args.dtype, "processes": args.processes,
        "layers": args.layers, "rows": args.rows, "pairs": len(ratios), "ms": 1e3 * ours, "peer_ms": 1e3 * theirs,
        "median": statistics.median(ratios), "mean": mean, "upper": upper,
    }  # fmt: skip


if __name__ == "__main__":
    main()
