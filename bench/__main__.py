"""``python -m bench``: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence

from bench.case import DTYPES, default_suites, suites
from bench.harness import ALLOCATORS, WAIT_POLICIES, Options, Results, read_jsonl, run, select, write_jsonl
from bench.rows import ROWS

EXAMPLES = """examples:
  python -m bench --quick                                  every operation, eager torch only, under 2 minutes
  python -m bench --suite attention --dtype bfloat16       one kernel, compiled peers included
  python -m bench --case 'layer_norm/64x64/*'              the cases whose name fits
  python -m bench --suite train_step --json steps.jsonl    whole GPT-2 steps, results kept
  python -m bench --suite shakespeare --data tinyshakespeare.txt
  python -m bench --rows --json results.jsonl              what docs/results.md and the README's table show
  python -m bench --list                                   names of all cases
  python -m bench road --seeds 8                           alignment's road over seeds (bench/road.py)
  python -m bench ptx --seeds 5                            what alignment costs, PPO against PPO-ptx (bench/ptx)
  python -m bench preferences                              six preference losses, and an ensemble's disagreement
  python -m bench secrets                                  constitution and AI feedback, attacked (bench/secrets)
  python -m bench self-instruct                            a set of instructions grown (bench/self_instruct.py)
  python -m bench --plot plots --from-json steps.jsonl     roofline pictures of kept results
The last lines of the output are one JSON object for each case and setting (keys in docs/benchmarks.md).
"""


# Commands of their own, by the module whose ``main`` takes the rest of the line.
STUDIES = {
    "road": "bench.road",
    "ptx": "bench.ptx",
    "preferences": "bench.preferences",
    "secrets": "bench.secrets.study",
    "self-instruct": "bench.self_instruct",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time gptcore against torch, interleaved, and against the machine's own ceilings.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", action="append", metavar="NAME", help=f"one of: {', '.join(suites())}; may be repeated")
    add(
        "--case",
        action="append",
        metavar="GLOB",
        help="only cases whose name (or name/dtype) fits; may be repeated",
    )
    add(
        "--rows",
        action="store_true",
        help="the cases of docs/results.md: every target; an hour on two cores for one allocator setting",
    )
    add("--dtype", action="append", choices=DTYPES, help="only this dtype")
    add(
        "--quick",
        action="store_true",
        help="under 2 minutes: no compiled peers, no whole steps, fewer repeats",
    )
    add("--json", metavar="FILE", help="also write machines and records to FILE, one JSON object a line")
    add("--plot", metavar="DIR", help="also draw a roofline picture of each suite into DIR")
    add("--from-json", metavar="FILE", help="measure nothing: take the records from FILE (for --plot)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="OpenMP threads for ours and peers alike (default: usable cores)",
    )
    add(
        "--allocator",
        choices=(*ALLOCATORS, "both"),
        help="malloc settings (default: both, with --quick tuned)",
    )
    add("--wait-policy", choices=(*WAIT_POLICIES, "both"), default="both",
        help="spin2000 for all and default for small operations (default: both)")  # fmt: skip
    add("--product-bits", choices=("gptcore", "torch"), default="gptcore",
        help="torch: leave MKL_CBWR as torch alone would run")  # fmt: skip
    add("--repeats", type=int, metavar="N", help="samples for each participant (default: 20, whole steps 5)")
    add("--cold", action="store_true", help="flush the caches before every call")
    add("--data", metavar="FILE", help="tinyshakespeare.txt (default: ../shared/data beside the repository)")
    add("--list", action="store_true", help="print the names of the chosen cases and stop")
    return parser


def _both(value: str, names: Sequence[str]) -> list[str]:
    return list(names) if value == "both" else [value]


def _options(arguments: argparse.Namespace) -> Options:
    every = suites()
    patterns = arguments.case or (ROWS if arguments.rows else ())
    chosen = arguments.suite or (every if patterns else default_suites())
    unknown = [name for name in chosen if name not in every]
    if unknown:
        raise ValueError(f"--suite {unknown[0]}: there is no such suite; known: {', '.join(every)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for option in ("threads", "repeats"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value}: expected at least 1")
    return Options(
        suites=chosen,
        patterns=patterns,
        dtypes=arguments.dtype or DTYPES,
        allocators=_both(arguments.allocator or ("tuned" if arguments.quick else "both"), ALLOCATORS),
        wait_policies=_both(arguments.wait_policy, ("spin2000", "default")),
        product_bits=arguments.product_bits,
        device=arguments.device,
        threads=arguments.threads or cores,
        quick=arguments.quick,
        cold=arguments.cold,
        repeats=arguments.repeats,
        data=arguments.data,
    )


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _measure(arguments: argparse.Namespace, options: Options) -> tuple[Results, bool]:
    """The results, and whether all of the run came to its end."""
    if arguments.from_json:
        return read_jsonl(arguments.from_json), True
    _check_device(options.device)
    if not select(options):
        raise ValueError("no case fits these options; see python -m bench --list")
    if arguments.json:
        # A path that cannot be written is worth knowing before half an hour of measuring.
        with open(arguments.json, "a", encoding="utf-8"):
            pass
    results = Results()
    # A terminated run must not leave its measuring process behind to disturb the next one.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(options, results)
    except KeyboardInterrupt:
        print("bench: interrupted; what follows is what was measured until now", file=sys.stderr)
        return results, False
    return results, True


def _print_results(results: Results) -> None:
    from bench.machine import Ceilings, summary

    for machine in results.machines:
        described = {key: value for key, value in machine.items() if key != "ceilings"}
        print(", ".join(f"{key} {value}" for key, value in described.items()))
        print(summary(Ceilings.from_json(machine["ceilings"])))
    for name, reason in results.failures:
        print(f"NOT MEASURED {name}: {reason}")
    for record in results.records:
        print(json.dumps(record))


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every chosen case was measured, 1 when some were not, 2 for a wrong option."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in STUDIES:
        return int(importlib.import_module(STUDIES[words[0]]).main(words[1:]))
    arguments = build_parser().parse_args(argv)
    try:
        options = _options(arguments)
        if arguments.list:
            print("\n".join(f"{case.name}/{dtype}" for case, dtype in select(options)))
            return 0
        results, complete = _measure(arguments, options)
        if arguments.json and not arguments.from_json:
            write_jsonl(arguments.json, results)
        if arguments.plot:
            from bench.plot import plot_all

            for path in plot_all(results, arguments.plot):
                print(path)
    except (ValueError, OSError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    _print_results(results)
    return 0 if complete and not results.failures else 1


if __name__ == "__main__":
    sys.exit(main())
