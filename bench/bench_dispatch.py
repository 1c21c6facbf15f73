"""What a call costs before any work: three torch tensors into an empty kernel, and importing the package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from bench.case import Callables, Case, Measured, Target

TARGET_CALL_MS = 0.0005
TARGET_IMPORT_MS = 100.0
_TIMED_IMPORT = """
import sys, time
start = time.perf_counter()
import {module}
took = time.perf_counter() - start
print(took, int("{module}" == "gptcore" and ("torch" in sys.modules or "numpy" in sys.modules)))
"""


def _setup_noop(target: Target) -> Callables:
    import torch

    from gptcore import backend

    noop = backend.extension().noop
    a, b, c = (target.randn(64, 64) for _ in range(3))
    out = torch.empty(0)
    return {"gptcore": lambda: noop(a, b, c), "torch_smallest_op": lambda: out.detach()}


def _measure_import(target: Target, note: Callable[[str], None]) -> Measured:
    """Seconds of the import statement, each in a new interpreter, beside what it must not pull in."""
    samples: dict[str, list[float]] = {"gptcore": [], "numpy": [], "torch": []}
    for _ in range(3 if target.quick else 7):
        for module, values in samples.items():
            values.append(_import_seconds(module))
    return Measured(samples)


def _import_seconds(module: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _TIMED_IMPORT.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, heavy = done.stdout.split()
    if heavy == "1":
        raise RuntimeError("import gptcore has loaded torch or NumPy, which it must not")
    return float(seconds)


CASES = [
    Case(
        "dispatch/noop_three_tensors/call", _setup_noop, dtypes=("float32",), small=True, tolerance=None,
        target_ms=TARGET_CALL_MS, footnotes={"torch_smallest_op": "a view of one tensor, for scale"},
    ),
    Case(
        "dispatch/import_gptcore/call", dtypes=("float32",), measure=_measure_import,
        target_ms=TARGET_IMPORT_MS, footnotes={"numpy": "for scale", "torch": "for scale"},
    ),
]  # fmt: skip
