"""Peak memory of a case's participants, each in a process of its own.

A peak belongs to a process, so a child builds one participant, calls it a few times and reports the largest resident
size it reached less the size after the imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

from bench import ROOT
from bench.bench_train_step import step_flops
from bench.case import OURS, Case, Cost, Measured, Target

Participants = Callable[[Target, int, int], Mapping[str, object]]

# The first step allocates moments and gradients, the second meets them all; the others show that it stays so.
STEPS = 4


def _resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no line {key}")


def peak_of(factory: Callable[[], Callable[[], object]]) -> dict[str, object]:
    """``peak`` in bytes over what the imports take, and ``seconds`` of each step; measures this very process."""
    import torch  # part of what the imports take

    from bench import trainer  # noqa: F401

    torch.zeros(1).add_(1)
    before = _resident("VmRSS")
    step = factory()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"peak": _resident("VmHWM") - before, "seconds": seconds}


def measure(
    module: str, names: Iterable[str], arguments: Sequence[str], note: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the steps but the first, and peaks in MiB, by participant, of ``module NAME ARGUMENTS``, which prints
    what :func:`peak_of` gives."""
    samples: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for name in names:
        command = [sys.executable, "-m", module, name, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        samples[name] = found["seconds"][1:]
        peaks[name] = round(found["peak"] / 2**20)
        note(f"{name}: {peaks[name]:.0f} MiB")
    return samples, peaks


def peak_case(
    module: str,
    suite: str,
    participants: Participants,
    batch: int,
    length: int,
    *,
    shown: Container[str],
    footnotes: Mapping[str, str],
) -> Case:
    """The peaks of a step of GPT-2 124M for what ``participants`` gives by name; those in ``shown`` are not judged
    against."""

    def measured(target: Target, note: Callable[[str], None]) -> Measured:
        arguments = [target.dtype, str(batch), str(length)]
        samples, peaks = measure(module, participants(target, batch, length), arguments, note)
        least = min(mib for name, mib in peaks.items() if name != OURS and name not in shown)
        return Measured(samples, {"peak_mib": peaks, "memory_ratio": round(peaks[OURS] / least, 4)})

    return Case(
        f"{suite}/gpt2_124m_B{batch}_T{length}/step",
        cost=lambda _element: Cost(step_flops(batch * length, length)),
        repeats=STEPS - 1,
        quick=False,
        footnotes=dict(footnotes),
        once=True,
        tokens=batch * length,
        measure=measured,
    )
