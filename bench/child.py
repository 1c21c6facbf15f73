"""The measuring process: runs cases under one setting and reports each as a line of JSON.

Started by :mod:`bench.harness`, one process for each setting, because malloc, libgomp and MKL read
their variables when the process starts. Reads a job from standard input, writes events to standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from bench import machine
from bench.case import ELEMENT_BYTES, OURS, PLAIN, Case, Target, load
from bench.timing import (
    MIN_DEVICE_SECONDS,
    MIN_SAMPLE_SECONDS,
    CacheFlush,
    interleave,
    statistics,
    time_calls,
    warm_up,
)

# Dense bf16, NVIDIA's datasheets of H100 and H200 SXM.
H200_BF16_FLOPS = 989.4e12
MAX_DRIFT = 0.05
MAX_ATTEMPTS = 3
# A case of --quick stops sampling after about this long, but never below three samples.
QUICK_SECONDS = 0.6


class CaseError(Exception):
    """A case that cannot be measured: its operation is missing, it disagrees with its peer, it raised."""


@dataclass
class Job:
    """What one child has to do; the parent sends it as JSON."""

    cases: list[tuple[str, str]]
    device: str = "cpu"
    threads: int = 1
    allocator: str = "default"
    wait_policy: str = "spin2000"
    quick: bool = False
    cold: bool = False
    repeats: int | None = None
    data: str | None = None


class Child:
    """Measures the cases of one job."""

    def __init__(self, job: Job, emit: Callable[[dict[str, Any]], None]) -> None:
        import torch

        self._job, self._emit, self._torch = job, emit, torch
        self._synchronize = torch.cuda.synchronize if job.device == "cuda" else lambda: None
        self._flush = CacheFlush(device=job.device)
        self._ceilings = machine.measure(job.device, quick=job.quick)
        self._probe = machine.DriftProbe(job.device)
        described = machine.describe(job.device, job.allocator, job.wait_policy)
        emit({"event": "machine", **described, "ceilings": self._ceilings.as_json()})
        # torch's own objects live as long as the process; walking them costs each collection 0.1 s.
        gc.freeze()

    def run(self) -> None:
        """Measure every case of the job; one that fails is reported and does not stop the others."""
        for name, dtype in self._job.cases:
            self._emit({"event": "begin", "case": name, "dtype": dtype})
            try:
                case = next((c for c in load(name.split("/", 1)[0]) if c.name == name), None)
                if case is None:
                    raise CaseError(f"there is no case '{name}'")
                record = self._measure(case, dtype)
            except Exception as error:
                reason = str(error) if isinstance(error, CaseError) else f"{type(error).__name__}: {error}"
                self._emit({"event": "failed", "case": name, "dtype": dtype, "reason": reason.split("\n")[0]})
                if not isinstance(error, CaseError | ImportError | AttributeError):
                    traceback.print_exc()
            else:
                self._emit({"event": "record", "record": record})
            self._clear()

    def _clear(self) -> None:
        if not self._job.quick and "torch._dynamo" in sys.modules:
            self._torch._dynamo.reset()
        gc.collect()

    def _measure(self, case: Case, dtype: str) -> dict[str, Any]:
        target = Target(dtype, self._job.device, data=self._job.data, quick=self._job.quick)
        if case.measure is not None:
            measured = case.measure(target, lambda text: self._emit({"event": "note", "text": text}))
            return self._record(case, dtype, measured.samples, 0.0, measured.extra)
        if case.setup is None:
            raise CaseError(f"case '{case.name}' has neither setup nor measure")
        with _fallbacks_noted() as fallbacks:
            extra: dict[str, Any] = {}
            calls = self._participants(case, target, extra)
            if self._job.device == "cuda" and not case.heavy:
                extra["peak_mib"] = {name: self._peak_mib(call) for name, call in calls.items()}
            samples, drift = self._sample(case, calls)
        if fallbacks:
            extra["fallbacks"] = fallbacks
        return self._record(case, dtype, samples, drift, extra)

    def _participants(
        self, case: Case, target: Target, extra: dict[str, Any]
    ) -> dict[str, Callable[[], Any]]:
        assert case.setup is not None
        named = dict(case.setup(target))
        if OURS not in named:
            raise CaseError(f"case '{case.name}' has no callable '{OURS}'")
        if self._job.quick:
            named = {name: call for name, call in named.items() if "compiled" not in name}
        if case.heavy:
            named = self._finalists(named, extra)
        elif case.tolerance is not None:
            _check_agreement(named, case.tolerance[target.dtype])
        return named

    def _finalists(self, factories: Mapping[str, Any], extra: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        """Ours and the fastest peer, built; the other peers are timed alone first and torn down.

        Five GPT-2s with their optimizers do not fit into memory together.
        """
        heats: dict[str, float] = {}
        for name in factories:
            if name != OURS:
                call = factories[name]()
                warm_up(call, self._synchronize, calls=2)
                heats[name] = min(time_calls(call, 1, self._synchronize) for _ in range(2))
                self._emit({"event": "note", "text": f"{name}: {heats[name] * 1e3:.0f} ms"})
                del call
                self._clear()
        fastest = min(heats, key=heats.__getitem__)
        extra["heats_ms"] = {name: round(seconds * 1e3, 3) for name, seconds in heats.items()}
        if self._job.device == "cuda":
            extra["peak_mib"] = {name: self._built_peak_mib(factories[name]) for name in (OURS, fastest)}
        return {name: factories[name]() for name in (OURS, fastest)}

    def _peak_mib(self, call: Callable[[], Any]) -> float:
        """What a call takes of the GPU's memory at its most, beyond what is there before it."""
        cuda = self._torch.cuda
        call()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        call()
        return round((cuda.max_memory_allocated() - before) / 2**20, 1)

    def _built_peak_mib(self, factory: Callable[[], Callable[[], Any]]) -> float:
        """The same of a participant with all that it keeps: weights, moments, buffers of graphs."""
        cuda = self._torch.cuda
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        call = factory()
        for _ in range(2):
            call()
        peak = cuda.max_memory_allocated() - before
        del call
        self._clear()
        cuda.empty_cache()
        return round(peak / 2**20, 1)

    def _sample(
        self, case: Case, calls: dict[str, Callable[[], Any]]
    ) -> tuple[dict[str, list[float]], float]:
        """Samples of the attempt with the least drift of the machine's ceiling, and that drift."""
        settle = {"calls": 1, "min_seconds": 0.02} if self._job.quick else {}
        warm = {name: warm_up(call, self._synchronize, **settle) for name, call in calls.items()}
        flush = self._flush if case.cold or self._job.cold else None
        repeats = self._repeats(case, warm)
        best: dict[str, list[float]] = {}
        least = float("inf")
        for _ in range(1 if self._job.quick else MAX_ATTEMPTS):
            before = self._probe()
            samples = interleave(
                calls, repeats=repeats, warm=warm, flush=flush, synchronize=self._synchronize,
                min_seconds=MIN_DEVICE_SECONDS if self._job.device == "cuda" else MIN_SAMPLE_SECONDS,
            )  # fmt: skip
            drift = machine.drift(before, self._probe())
            if drift < least:
                best, least = samples, drift
            if least <= MAX_DRIFT:
                break
        return best, least

    def _repeats(self, case: Case, warm: Mapping[str, float]) -> int:
        if self._job.repeats is not None:
            return self._job.repeats
        if not self._job.quick:
            return case.repeats
        one_round = sum(max(seconds, 1e-3) for seconds in warm.values())
        return max(min(3, case.repeats), min(case.repeats, int(QUICK_SECONDS / one_round)))

    def _record(
        self,
        case: Case,
        dtype: str,
        samples: Mapping[str, list[float]],
        drift: float,
        extra: Mapping[str, Any],
    ) -> dict[str, Any]:
        cost = case.cost(ELEMENT_BYTES[dtype])
        limit = self._ceilings.limit_seconds(cost, dtype)
        return build_record(case, dtype, samples, limit, self._job) | {
            "flops": cost.flops,
            "bytes": cost.bytes,
            "drift": round(drift, 4),
            **extra,
        }


def build_record(
    case: Case, dtype: str, samples: Mapping[str, list[float]], limit_seconds: float, job: Job
) -> dict[str, Any]:
    """The JSON object of one case: see docs/benchmarks.md for its keys.

    ``ratio`` is the best peer's time over ours (above 1: we are faster), without the peers that a
    footnote excuses; None where there is no peer. ``limit_fraction`` is the roofline's time over ours.
    """
    medians = {name: statistics(values) for name, values in samples.items()}
    ours = medians[OURS]
    peers = {name: round(s.median * 1e3, 6) for name, s in medians.items() if name not in (OURS, PLAIN)}
    judged = {name: ms for name, ms in peers.items() if name not in case.footnotes}
    best = min(judged, key=judged.__getitem__) if judged else None
    record: dict[str, Any] = {
        "case": case.name,
        "device": job.device,
        "dtype": dtype,
        "threads": job.threads,
        "repeats": ours.repeats,
        "gptcore_ms": round(ours.median * 1e3, 6),
        "spread": round(ours.spread, 4),
        "peers": peers,
        "ratio": round(medians[best].median / ours.median, 4) if best else None,
        "limit_fraction": round(limit_seconds / ours.median, 4) if limit_seconds else None,
        "allocator": job.allocator,
        "wait_policy": job.wait_policy,
        "best_peer": best,
    }
    if PLAIN in samples:
        # Samples of one round lie side by side, so that a neighbour slows both.
        pairs = [a / b for a, b in zip(samples[OURS], samples[PLAIN], strict=True)]
        record["over_plain"] = round(statistics(pairs).median, 4)
    if case.target_ms is not None:
        record["target_ms"] = case.target_ms
    if case.tokens:
        record["tokens_per_s"] = round(case.tokens / ours.median, 1)
        if job.device == "cuda":  # the convention of the field: of the datasheet's dense bf16 rate
            record["mfu"] = round(case.cost(ELEMENT_BYTES[dtype]).flops / ours.median / H200_BF16_FLOPS, 4)
    if case.footnotes:
        record["footnotes"] = dict(case.footnotes)
    return record


def _check_agreement(calls: Mapping[str, Callable[[], Any]], tolerance: float) -> None:
    """Refuse to time wrong results: each tensor of ours against the first peer's, by relative 2-norm."""
    peer = next((name for name in calls if name not in (OURS, PLAIN)), None)
    if peer is None:
        return
    ours, theirs = _leaves(calls[OURS]()), _leaves(calls[peer]())
    if len(ours) != len(theirs):
        raise CaseError(f"gptcore returns {len(ours)} tensors, {peer} returns {len(theirs)}")
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            raise CaseError(
                f"result {index}: gptcore has shape {tuple(a.shape)}, {peer} has {tuple(b.shape)}"
            )
        a, b = a.detach().double(), b.detach().double()
        scale = float(b.norm()) or 1.0
        error = float((a - b).norm()) / scale
        if not error <= tolerance:
            raise CaseError(
                f"result {index} differs from {peer} by {error:.2e} of its norm, expected {tolerance:.0e}"
            )


def _leaves(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


@contextlib.contextmanager
def _fallbacks_noted() -> Iterator[dict[str, Any]]:
    """Collect which of our calls went to torch: such a case measures torch against torch."""
    noted: dict[str, Any] = {}
    try:
        from gptcore import backend

        backend.reset_report()
    except (ImportError, AttributeError):
        yield noted
        return
    yield noted
    noted.update({str(call): str(reason) for call, reason in backend.report().items()})


def _event_stream() -> TextIO:
    """Our own copy of standard output; whatever compilers print there goes to standard error instead."""
    sys.stdout.flush()
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def _die_with_parent() -> None:
    """Have Linux end this process when the harness dies, however it dies."""
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    _die_with_parent()
    job = Job(**json.load(sys.stdin))
    job.cases = [(name, dtype) for name, dtype in job.cases]
    events = _event_stream()

    # gptcore first: it asks MKL for reproducible bits before torch loads it, as a user's program does.
    import gptcore  # noqa: F401

    if job.threads:
        import torch

        torch.set_num_threads(job.threads)
    Child(job, lambda event: print(json.dumps(event), file=events, flush=True)).run()
    print(json.dumps({"event": "end"}), file=events, flush=True)


if __name__ == "__main__":
    main()
