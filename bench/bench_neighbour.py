"""What a busy neighbour costs: cases of other suites, timed while another process keeps each core busy.

Two equal claims on a core leave half of it, so a factor of 2 is the least that a long operation can lose. What
comes on top is waiting for a thread that is not running: a team that spins burns the share it should work with.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from bench.case import OURS, Case, Measured, Target, load

REPEATS = 5
# A phase is many scheduler slices long, so that its mean call tells of shares and not of luck.
PHASE_SECONDS = 1.0
BURN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"

CHOSEN = (
    ("layer_norm/4096x768/forward", ("float32",)),
    ("attention/B2_H12_T512_D64_causal/forward_backward", ("bfloat16",)),
    ("matmul/accumulate_K1024_M3072_N768/forward", ("bfloat16",)),
    ("adamw/blocks_28m_amsgrad/step", ("float32",)),
    ("train_step/gpt2_124m_B2_T512/step", ("bfloat16",)),
)
# Of a whole step's peers the one that is fastest uncompiled.
STEP_PEER = "torch_bf16_eager"


@contextlib.contextmanager
def neighbours() -> Iterator[Callable[[bool], None]]:
    """A process bound to each usable core, stopped; yields what sets them running or stops them."""
    burning = [
        subprocess.Popen([sys.executable, "-c", BURN, str(core)]) for core in sorted(os.sched_getaffinity(0))
    ]

    def run(busy: bool) -> None:
        for process in burning:
            process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)

    try:
        time.sleep(0.5)  # until each has bound itself
        run(False)
        yield run
    finally:
        for process in burning:
            process.kill()
            process.wait()


def _mean_call(call: Callable[[], object], seconds: float) -> float:
    start, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds or calls == 0:
        call()
        calls += 1
    return spent / calls


def _calls(case: Case, target: Target) -> dict[str, Callable[[], object]]:
    """Ours and the eager peers; of participants that must be built only ours and STEP_PEER."""
    assert case.setup is not None
    named = case.setup(target)
    if case.heavy:
        return {name: named[name]() for name in (OURS, STEP_PEER)}
    return {name: call for name, call in named.items() if "compiled" not in name}


def _measure(target: Target, note: Callable[[str], None], *, case: Case) -> Measured:
    calls = _calls(case, target)
    quiet: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    with neighbours() as run:
        for call in calls.values():
            call()
        for _ in range(REPEATS):
            for name, call in calls.items():
                quiet[name].append(_mean_call(call, PHASE_SECONDS / 2))
                run(True)
                busy[name].append(_mean_call(call, PHASE_SECONDS))
                run(False)
    slowdown = {name: round(sum(busy[name]) / sum(quiet[name]), 3) for name in calls}
    note(", ".join(f"{name}: {factor:.2f} times slower" for name, factor in slowdown.items()))
    return Measured(busy, {"slowdown": slowdown})


def _case(name: str, dtypes: tuple[str, ...]) -> Case:
    case = next(case for case in load(name.split("/", 1)[0]) if case.name == name)
    return Case(
        f"neighbour/{name.replace('/', '_', 1)}",
        cost=case.cost,
        dtypes=dtypes,
        repeats=REPEATS,
        quick=False,
        once=True,
        measure=functools.partial(_measure, case=case),
    )


CASES = [_case(name, dtypes) for name, dtypes in CHOSEN]
