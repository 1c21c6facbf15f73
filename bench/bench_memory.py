"""Peak memory of a whole training step of GPT-2 124M, each participant in a process of its own.

A peak belongs to a process, so a child builds one participant, trains a few steps and reports the largest
resident size it reached less the size after the imports. Its times are those of that short run.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import ROOT
from bench.bench_train_step import participants, step_flops
from bench.case import OURS, Case, Cost, Measured, Target

# The first step allocates moments and gradients, the second meets them all; the others show that it stays so.
STEPS = 4
# Shown, not judged against.
WITHOUT_MASTERS = {
    "torch_bf16_eager": "weights and moments in bf16, without the f32 masters that the others keep"
}


def _resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no line {key}")


def peak_of(name: str, dtype: str, batch: int, length: int) -> dict[str, object]:
    """``peak`` in bytes over what the imports take, and ``seconds`` of each step; measures this very process."""
    import torch  # part of what the imports take

    from bench import trainer  # noqa: F401

    factory = participants(Target(dtype), batch, length)[name]
    torch.zeros(1).add_(1)
    before = _resident("VmRSS")
    step = factory()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"peak": _resident("VmHWM") - before, "seconds": seconds}


def _measure(target: Target, note: Callable[[str], None], *, batch: int, length: int) -> Measured:
    samples: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for name in participants(target, batch, length):
        # Compiling takes memory of its own, which the step does not need.
        if "compiled" in name:
            continue
        command = [sys.executable, "-m", "bench.bench_memory", name, target.dtype, str(batch), str(length)]
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        samples[name] = found["seconds"][1:]
        peaks[name] = round(found["peak"] / 2**20)
        note(f"{name}: {peaks[name]:.0f} MiB")
    least = min(peak for name, peak in peaks.items() if name != OURS and name not in WITHOUT_MASTERS)
    return Measured(samples, {"peak_mib": peaks, "memory_ratio": round(peaks[OURS] / least, 4)})


def _case(batch: int, length: int) -> Case:
    return Case(
        f"memory/gpt2_124m_B{batch}_T{length}/step",
        cost=lambda _element: Cost(step_flops(batch * length, length)),
        repeats=STEPS - 1,
        quick=False,
        footnotes=WITHOUT_MASTERS,
        once=True,
        tokens=batch * length,
        measure=functools.partial(_measure, batch=batch, length=length),
    )


CASES = [_case(2, 512), _case(4, 1024)]


if __name__ == "__main__":
    chosen, precision, rows, columns = sys.argv[1:]
    print(json.dumps(peak_of(chosen, precision, int(rows), int(columns))))
