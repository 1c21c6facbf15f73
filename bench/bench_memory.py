"""Peak memory of a whole training step of GPT-2 124M, each participant in a process of its own.

Its times are those of that short run.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable

from bench.bench_train_step import participants, step_flops
from bench.case import OURS, Case, Cost, Measured, Target
from bench.peak import STEPS, measure, peak_of

# Shown, not judged against.
WITHOUT_MASTERS = {
    "torch_bf16_eager": "weights and moments in bf16, without the f32 masters that the others keep"
}


def _measure(target: Target, note: Callable[[str], None], *, batch: int, length: int) -> Measured:
    # Compiling takes memory of its own, which the step does not need.
    names = [name for name in participants(target, batch, length) if "compiled" not in name]
    arguments = [target.dtype, str(batch), str(length)]
    samples, peaks = measure("bench.bench_memory", names, arguments, note)
    least = min(mib for name, mib in peaks.items() if name != OURS and name not in WITHOUT_MASTERS)
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
    print(json.dumps(peak_of(participants(Target(precision), int(rows), int(columns))[chosen])))
