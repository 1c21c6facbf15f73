"""Show what gptcore runs on: versions, instruction sets, threads, OpenMP runtimes and CUDA devices.

GPTCORE_ISA=v3 (or another one listed) picks the instruction set, OMP_NUM_THREADS the threads.

Examples:
  gptcore info
  gptcore info --json                     for scripts and bug reports
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from gptcore import __version__, backend

    facts = backend.info()
    facts = {**facts, "version": __version__, "native_version": facts["version"]}
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return 0


def describe(facts: Mapping[str, Any]) -> str:
    """The facts of ``gptcore.backend.info()`` as aligned lines, with what to do where something is amiss."""
    runtimes = facts["openmp_runtimes"]
    rows = [
        ("gptcore", facts["version"]),
        ("python", facts["python"]),
        ("torch", facts["torch"] or "not installed"),
        ("numpy", facts["numpy"] or "not installed"),
        ("ISA", f"{facts['isa']} (available: {', '.join(facts['isas'])})"),
        ("threads", f"{facts['threads']} ({facts['threads_reason']})"),
        ("OpenMP", ", ".join(runtimes) or "none loaded yet"),
        ("MKL_CBWR", _reproducibility(facts)),
        ("CUDA", _cuda(facts)),
        ("kernels", _cuda_kernels(facts)),
    ]
    if facts["native_version"] not in (None, facts["version"]):
        rows.append(
            ("warning", f"the native module is of version {facts['native_version']}; reinstall gptcore")
        )
    if len(runtimes) > 1:
        rows.append(("warning", "several OpenMP runtimes are loaded; their threads fight over the cores"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _reproducibility(facts: Mapping[str, Any]) -> str:
    if facts["mkl_cbwr"] is None:
        return "not set, f32 products may change their last bits with the number of threads"
    late = "" if facts["mkl_cbwr_in_time"] else ", but torch was loaded before it was set"
    return f"{facts['mkl_cbwr']}{late}"


def _cuda(facts: Mapping[str, Any]) -> str:
    if not facts["cuda_devices"]:
        return f"no device ({facts['cuda_reason']})"
    return ", ".join(str(device) for device in facts["cuda_devices"])


def _cuda_kernels(facts: Mapping[str, Any]) -> str:
    """For which operations there are CUDA kernels, and which devices cannot run them."""
    names = ", ".join(facts["cuda_kernels"])
    unfit = [f"cuda:{index}: {reason}" for index, reason in facts["cuda_unfit"].items() if reason is not None]
    return "; ".join([f"CUDA's of {names}" if names else "none for CUDA", *unfit])
