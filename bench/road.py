"""The road over several seeds, with paired tests: ``python -m bench road --seeds 8``.

Each seed has tasks, held-out pairs, weights and samples of its own, in a directory of its own; what has ended is not
done again, so the command can be stopped and given again. Printed, and kept as ``seeds.json`` and ``seeds.txt``: the
mean accuracy of every stage over the seeds with Student's interval, and exact permutation and t tests of PPO against
fine-tuning and against its control of equal compute, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from gptcore import backend
from gptcore.align.road import run as road
from gptcore.align.road.report import Report, Row
from gptcore.align.road.settings import FAST, RoadSpec
from gptcore.data.atomic import write_text
from gptcore.stats import intervals, significance

WAYS = ("greedy", "sampled")


def main(argv: Sequence[str] | None = None) -> int:
    """Walk the road once for each seed and print what they come to together."""
    parser = argparse.ArgumentParser(prog="python -m bench road", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="seeds 1 to N (8)")
    parser.add_argument("--out", default="runs/road-seeds", metavar="DIR", help="(runs/road-seeds)")
    parser.add_argument("--fast", action="store_true", help="the short road")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="seeds at a time, sharing the cores (1)"
    )
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error(f"--seeds {arguments.seeds}: expected at least 2, tests are over them")
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: expected at least 1")
    specs = [
        RoadSpec.from_dict({**(FAST if arguments.fast else {}), "seed": seed})
        for seed in range(1, arguments.seeds + 1)
    ]
    table = together(walked(specs, Path(arguments.out), arguments.jobs))
    write_text(Path(arguments.out) / "seeds.json", json.dumps(table, indent=1) + "\n")
    lines = told(table)
    write_text(Path(arguments.out) / "seeds.txt", "\n".join(lines) + "\n")
    print("\n".join(["", *lines]))
    return 0


def walked(specs: Sequence[RoadSpec], out: Path, jobs: int) -> list[Report]:
    """The reports of ``specs``, each in a directory of its seed, ``jobs`` of them at a time."""
    places = [out / f"seed-{spec.seed}" for spec in specs]
    if jobs == 1:
        return [_walk(place, spec) for place, spec in zip(places, specs, strict=True)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    fresh = multiprocessing.get_context("spawn")  # a forked process would share OpenMP's state
    with ProcessPoolExecutor(jobs, fresh, _keep_to, (threads,)) as pool:
        return list(pool.map(_walk, places, specs))


def _keep_to(threads: int) -> None:
    import torch  # here, since gptcore, which fixes the bits of MKL's products, has to come before it

    torch.set_num_threads(threads)
    backend.set_num_threads(threads)


def _walk(place: Path, spec: RoadSpec) -> Report:
    def say(text: str) -> None:
        print(f"seed {spec.seed}, {text}", flush=True)

    return road.run(place, spec, quiet=True, say=say)


def together(reports: Sequence[Report]) -> dict[str, object]:
    """Accuracies by stage, way and seed, their means, and the paired tests."""
    stages = {row.stage: row.name for row in reports[0].rows}
    accuracies = {
        stage: {way: [_estimate(report, stage, way) for report in reports] for way in WAYS}
        for stage in stages
    }
    tests = {
        f"PPO against {name}, {way}": {
            "permutation": significance.permutation(accuracies["ppo"][way], accuracies[stage][way]),
            "t": significance.paired_t(accuracies["ppo"][way], accuracies[stage][way]),
        }
        for stage, name in (("sft", "SFT"), ("more_sft", "more SFT"))
        for way in WAYS
    }
    return {"seeds": len(reports), "names": stages, "accuracies": accuracies, "tests": tests}


def _estimate(report: Report, stage: str, way: str) -> float:
    row: Row = next(row for row in report.rows if row.stage == stage)
    found = getattr(row, way)
    return float("nan") if found is None else float(found.estimate)


def told(table: dict[str, object]) -> list[str]:
    """The table in words."""
    lines = [f"held-out exact match in percent, mean over {table['seeds']} seeds [95% interval]"]
    for stage, name in table["names"].items():  # type: ignore[attr-defined]
        cells = []
        for way in WAYS:
            values = 100 * np.array(table["accuracies"][stage][way])  # type: ignore[index]
            if not np.isnan(values).any():
                found = intervals.mean(values)
                cells.append(f"{way} {found.estimate:.1f} [{found.low:.1f}, {found.high:.1f}]")
        lines.append(f"{name:40} {'  '.join(cells)}")
    for name, values in table["tests"].items():  # type: ignore[attr-defined]
        lines.append(f"{name}: p = {values['permutation']:.2g} (permutation), {values['t']:.2g} (t)")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
