"""Peak memory of a whole training step of GPT-2 124M, each participant in a process of its own.

Its times are those of that short run.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable

from bench.bench_train_step import participants as of_a_step
from bench.case import Target
from bench.peak import peak_case, peak_of

# Shown, not judged against.
WITHOUT_MASTERS = {
    "torch_bf16_eager": "weights and moments in bf16, without the f32 masters that the others keep"
}


def participants(target: Target, batch: int, length: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """Those of ``bench_train_step`` but the compiled ones: compiling takes memory of its own, which no step needs."""
    found = of_a_step(target, batch, length)
    return {name: factory for name, factory in found.items() if "compiled" not in name}


_case = functools.partial(
    peak_case, "bench.bench_memory", "memory", participants, shown=WITHOUT_MASTERS, footnotes=WITHOUT_MASTERS
)
CASES = [_case(2, 512), _case(4, 1024)]


if __name__ == "__main__":
    chosen, precision, rows, columns = sys.argv[1:]
    print(json.dumps(peak_of(participants(Target(precision), int(rows), int(columns))[chosen])))
