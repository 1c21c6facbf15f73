"""Plans a run, starts one measuring process for each setting, and collects their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from bench import ROOT
from bench.case import STEP_SUITES, Case, load
from bench.child import Job

ALLOCATORS: Mapping[str, Mapping[str, str]] = {
    # Large blocks stay in the heap instead of being mapped, faulted and unmapped on every call.
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    # What a user gets who sets nothing.
    "default": {},
}
WAIT_POLICIES: Mapping[str, Mapping[str, str]] = {
    "default": {},
    # libgomp spins for milliseconds by default, which turns a busy neighbour into a factor of ten.
    "spin2000": {"GOMP_SPINCOUNT": "2000"},
}
# "gptcore": the package asks MKL for reproducible bits. "torch": MKL as torch alone would run it.
PRODUCT_BITS: Mapping[str, Mapping[str, str]] = {"gptcore": {}, "torch": {"MKL_CBWR": ""}}
# Variables that a setting decides; the caller's own values are removed before it is applied.
DECIDED = (
    "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GOMP_SPINCOUNT",
    "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR",
)  # fmt: skip

# f32 products beyond this take a third of a second a call, too long for --quick.
QUICK_F32_FLOPS = 1e11

REQUIRED_KEYS = (
    "case", "device", "dtype", "threads", "repeats", "gptcore_ms", "spread", "peers", "ratio",
    "limit_fraction", "allocator", "wait_policy",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a process must be started with to be measured under it."""

    allocator: str = "default"
    wait_policy: str = "spin2000"
    product_bits: str = "gptcore"

    def environment(self, threads: int, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` with this setting's variables in place of whatever the caller had set."""
        kept = {name: value for name, value in base.items() if name not in DECIDED}
        return {
            **kept,
            **ALLOCATORS[self.allocator],
            **WAIT_POLICIES[self.wait_policy],
            **PRODUCT_BITS[self.product_bits],
            "OMP_NUM_THREADS": str(threads),
        }

    def __str__(self) -> str:
        return f"{self.allocator} allocator, {self.wait_policy} waiting"


@dataclass
class Options:
    """Choices of a run; defaults are those of ``python -m bench``."""

    suites: Sequence[str] = ()
    patterns: Sequence[str] = ()
    dtypes: Sequence[str] = ("float32", "bfloat16")
    allocators: Sequence[str] = ("tuned", "default")
    wait_policies: Sequence[str] = ("spin2000", "default")
    product_bits: str = "gptcore"
    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    cold: bool = False
    repeats: int | None = None
    data: str | None = None


@dataclass
class Results:
    """What a run found: one machine description for each setting, records, and failures as (case, reason)."""

    machines: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)


def select(options: Options) -> list[tuple[Case, str]]:
    """The chosen (case, dtype) pairs in the order of the suites."""
    chosen: list[tuple[Case, str]] = []
    for suite in options.suites:
        if options.quick and suite in STEP_SUITES and not options.patterns:
            continue
        for case in load(suite):
            chosen += [
                (case, dtype)
                for dtype in case.dtypes
                if dtype in options.dtypes
                and options.device in case.devices
                and (
                    case.matches(options.patterns, dtype)
                    if options.patterns
                    else _in_run(case, dtype, options)
                )
            ]
    return chosen


def _in_run(case: Case, dtype: str, options: Options) -> bool:
    """Whether a case that no pattern names belongs to this run."""
    too_long = dtype == "float32" and case.cost(4).flops > QUICK_F32_FLOPS
    return not options.quick or (case.quick in (True, dtype) and not too_long)


def plan(options: Options, chosen: Iterable[tuple[Case, str]]) -> list[tuple[Setting, list[tuple[str, str]]]]:
    """Which cases run under which setting.

    Every case under each allocator with the short spin; small operations also under OpenMP's default
    waiting, which is what users run, once, because an allocator does not matter to them. With ``quick``
    a case runs once: small ones under default waiting, the others under the short spin.
    """
    pairs = list(chosen)
    if options.device != "cpu":  # neither malloc nor waiting threads matter to it
        setting = Setting(options.allocators[0], "spin2000", options.product_bits)
        return [(setting, [(case.name, dtype) for case, dtype in pairs])] if pairs else []
    every = [(case.name, dtype) for case, dtype in pairs]
    once = {case.name for case, _ in pairs if case.once}
    small = [(case.name, dtype) for case, dtype in pairs if case.small]
    both = "spin2000" in options.wait_policies and "default" in options.wait_policies
    policy = "spin2000" if both else options.wait_policies[0]
    rest = [pair for pair in every if pair not in small] if both and options.quick else every
    jobs = []
    for allocator in options.allocators:
        here = rest if allocator == options.allocators[0] else [pair for pair in rest if pair[0] not in once]
        jobs.append((Setting(allocator, policy, options.product_bits), here))
    if both:
        jobs.append((Setting(options.allocators[-1], "default", options.product_bits), small))
    return [(setting, cases) for setting, cases in jobs if cases]


class Progress:
    """Counts cases and guesses the remaining time from those that are done."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total, self._stream = total, stream
        self._done, self._start = 0, time.monotonic()

    def step(self, line: str) -> None:
        self._done += 1
        elapsed = time.monotonic() - self._start
        left = elapsed / self._done * (self._total - self._done)
        self._stream.write(f"[{self._done}/{self._total}, {_clock(left)} left] {line}\n")
        self._stream.flush()

    def note(self, line: str) -> None:
        self._stream.write(f"    {line}\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def run(options: Options, results: Results, stream: TextIO | None = None) -> None:
    """Measure everything ``options`` chooses and add it to ``results``, which stays useful when interrupted.

    Progress goes to ``stream`` (default: standard error).
    """
    jobs = plan(options, select(options))
    progress = Progress(sum(len(cases) for _, cases in jobs), stream or sys.stderr)
    for setting, cases in jobs:
        progress.note(f"{len(cases)} cases with {setting}")
        _run_setting(options, setting, cases, progress, results)


def _run_setting(
    options: Options, setting: Setting, cases: list[tuple[str, str]], progress: Progress, results: Results
) -> None:
    """Run the cases of one setting, with a new process for the rest when one dies."""
    left = list(cases)
    while left:
        job = Job(
            left, options.device, options.threads, setting.allocator, setting.wait_policy, options.quick,
            options.cold, options.repeats, options.data,
        )  # fmt: skip
        finished = 0
        for event in _events(job, setting.environment(options.threads, os.environ)):
            kind = event.pop("event")
            if kind == "machine":
                if finished == 0 and len(left) == len(cases):
                    results.machines.append(event)
            elif kind == "note":
                progress.note(event["text"])
            elif kind == "record":
                finished += 1
                results.records.append(event["record"])
                progress.step(describe_record(event["record"]))
            elif kind == "failed":
                finished += 1
                results.failures.append((f"{event['case']}/{event['dtype']}", event["reason"]))
                progress.step(f"{event['case']}/{event['dtype']}: NOT MEASURED: {event['reason']}")
        if finished < len(left):
            name = "/".join(left[finished])
            results.failures.append((name, "the measuring process died"))
            progress.step(f"{name}: NOT MEASURED: the measuring process died")
            finished += 1
        left = left[finished:]


def _events(job: Job, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.child"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(job)))
        process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def describe_record(record: Mapping[str, Any]) -> str:
    """One line for people: ours, the best peer, the ratio, the share of the limit."""
    parts = [f"{record['case']}/{record['dtype']} ({record['allocator']}, {record['wait_policy']}):"]
    parts.append(f"{milliseconds(record['gptcore_ms'])} ±{record['spread'] * 50:.0f}%")
    if record["ratio"] is not None:
        best = record["best_peer"]
        parts.append(f"{best} {milliseconds(record['peers'][best])}, ratio {record['ratio']:.2f}")
    if record.get("over_plain"):
        parts.append(f"{record['over_plain']:.2f} of plain")
    if record["limit_fraction"] is not None:
        parts.append(f"limit {record['limit_fraction']:.0%}")
    if record.get("target_ms"):
        met = "met" if record["gptcore_ms"] <= record["target_ms"] else "MISSED"
        parts.append(f"target {milliseconds(record['target_ms'])} {met}")
    if record.get("tokens_per_s"):
        parts.append(f"{record['tokens_per_s']:.0f} tokens/s")
    if record.get("fallbacks"):
        parts.append(f"FELL BACK: {', '.join(record['fallbacks'])}")
    return "  ".join(parts)


def milliseconds(value: float) -> str:
    """A time in milliseconds in the unit that reads best."""
    if value < 0.1:
        return f"{value * 1e3:.2f} µs"
    return f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms" if value < 1e4 else f"{value / 1e3:.1f} s"


def write_jsonl(path: str, results: Results) -> None:
    """Machines first, then records, one JSON object a line."""
    lines = [json.dumps({"machine": machine}) for machine in results.machines]
    lines += [json.dumps(record) for record in results.records]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def read_jsonl(path: str) -> Results:
    """The results in a file of :func:`write_jsonl`. Raises ValueError naming the line that is not ours."""
    results = Results()
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not a line of JSON ({error.msg})") from None
            if isinstance(value, dict) and "machine" in value:
                results.machines.append(value["machine"])
            elif isinstance(value, dict) and all(key in value for key in REQUIRED_KEYS):
                results.records.append(value)
            else:
                raise ValueError(f"{path}:{number}: neither a machine nor a record of the benchmark")
    return results
