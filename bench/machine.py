"""The machine's own ceilings, measured in the run that is judged by them.

Bandwidth is measured at several working-set sizes, because a case of 2 MB runs from cache and one of
500 MB from memory; compute peaks come from the extension's register-only loop where it has one, else
from the best of several large products in torch. The method is named beside the figure.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.case import Cost

# Working sets in bytes, from a part of L2 (smaller ones would measure dispatch) to far beyond any cache. Close
# together where a last level of hundreds of MB ends: a rate between what it holds and what it does not would be
# one that nothing reaches.
WORKING_SETS = (512 << 10, 1 << 20, 8 << 20, 64 << 20, 128 << 20, 256 << 20, 512 << 20)
# On a GPU: within a second level of 50 MB, about its end, and far beyond.
DEVICE_WORKING_SETS = (16 << 20, 64 << 20, 256 << 20, 1 << 30, 4 << 30)
# Reads to writes: 1 : 0, 1 : 1, 1 : 1 of the same bytes, 2 : 1 of which one is written back.
TRAFFIC = ("read", "copy", "in_place", "update")
# (M, K, N): square ones and GPT-2's feed-forward products. The best one is the ceiling.
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 768, 3072), (2048, 4096, 4096))
DEVICE_PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 16384))


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: kind -> [(working set in bytes, bytes/s)]; peak: dtype -> flop/s; method: its origin."""

    bandwidth: dict[str, list[tuple[int, float]]]
    peak: dict[str, float]
    method: dict[str, str] = field(default_factory=dict)

    def bandwidth_at(self, kind: str, working_set: float) -> float:
        """Bytes/s for a working set, interpolated between measured sizes on a logarithmic axis."""
        points = self.bandwidth[kind]
        if working_set <= points[0][0]:
            return points[0][1]
        for (low, low_rate), (high, high_rate) in itertools.pairwise(points):
            if working_set <= high:
                share = math.log(working_set / low) / math.log(high / low)
                return low_rate + share * (high_rate - low_rate)
        return points[-1][1]

    def limit_seconds(self, cost: Cost, dtype: str) -> float:
        """The roofline: what the slower of arithmetic and memory needs at its ceiling; 0 if unknown."""
        arithmetic = cost.flops / self.peak[dtype] if cost.flops and self.peak.get(dtype) else 0.0
        memory = sum(num / self.bandwidth_at(kind, cost.bytes) for kind, num in cost.traffic if num)
        return max(arithmetic, memory)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Ceilings:
        bandwidth = {
            kind: [(int(s), float(r)) for s, r in points] for kind, points in values["bandwidth"].items()
        }
        return cls(bandwidth, dict(values["peak"]), dict(values["method"]))


def _best_seconds(
    call: Callable[[], Any], synchronize: Callable[[], None], budget: float, least: int = 3
) -> float:
    """The fastest of several calls: a ceiling is what the machine can do, not what it does on average."""
    call()
    synchronize()
    best, spent, done = float("inf"), 0.0, 0
    while done < least or (spent < budget and done < 400):
        start = time.perf_counter()
        call()
        synchronize()
        seconds = time.perf_counter() - start
        best, spent, done = min(best, seconds), spent + seconds, done + 1
    return best


def _synchronizer(device: str) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def measure_bandwidth(
    device: str = "cpu", sizes: Sequence[int] = WORKING_SETS, budget: float = 0.05
) -> dict[str, list[tuple[int, float]]]:
    """kind -> [(working set, bytes/s)]; the set counts all arrays, a copy both of its sides."""
    import torch

    synchronize = _synchronizer(device)
    rates: dict[str, list[tuple[int, float]]] = {kind: [] for kind in TRAFFIC}
    for size in sizes:
        array = torch.ones(size // 4, device=device)
        half = array[: size // 8]
        other = array[size // 8 : 2 * (size // 8)]
        readers = (lambda a=array: a.sum(), lambda a=array: torch.dot(a, a), lambda a=array: torch.amax(a, 0))
        calls = {
            "read": (readers, size),
            "copy": ((lambda a=half, b=other: a.copy_(b),), size),
            "in_place": ((lambda a=array: a.mul_(1.0), lambda a=array: a.neg_()), 2 * size),
            "update": ((lambda a=half, b=other: a.add_(b, alpha=0.0),), size * 3 // 2),
        }
        for kind, (variants, num_bytes) in calls.items():
            best = min(_best_seconds(call, synchronize, budget) for call in variants)
            rates[kind].append((size, num_bytes / best))
    return {kind: _never_rising(points) for kind, points in rates.items()}


def _never_rising(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Where a library's loop is slower on a smaller set than on a larger one, the machine is not."""
    best, raised = 0.0, []
    for size, rate in reversed(points):
        best = max(best, rate)
        raised.append((size, best))
    return raised[::-1]


def measure_peak(device: str = "cpu", budget: float = 0.15) -> tuple[dict[str, float], dict[str, str]]:
    """(dtype -> flop/s, dtype -> method)."""
    import torch

    synchronize = _synchronizer(device)
    peak: dict[str, float] = {}
    method: dict[str, str] = {}
    for dtype in ("float32", "bfloat16"):
        for m, k, n in PRODUCTS if device == "cpu" else DEVICE_PRODUCTS:
            # Random, since a GPU that multiplies ones draws less power and clocks higher.
            a = torch.randn(m, k, device=device).to(getattr(torch, dtype))
            b = torch.randn(k, n, device=device).to(getattr(torch, dtype))
            out = torch.empty(m, n, dtype=getattr(torch, dtype), device=device)
            call = functools.partial(torch.mm, a, b, out=out)
            rate = 2.0 * m * k * n / _best_seconds(call, synchronize, budget)
            if rate > peak.get(dtype, 0.0):
                peak[dtype], method[dtype] = rate, f"torch.mm {m}x{k}x{n}"
    if device == "cpu":
        _raise_by_register_loop(peak, method)
    return peak, method


def _raise_by_register_loop(peak: dict[str, float], method: dict[str, str]) -> None:
    """Use the extension's register-only loop where it exists and shows more than the library reaches."""
    try:
        from gptcore import backend

        loop = backend.extension().peak_flops
    except (ImportError, AttributeError):
        return
    for dtype in peak:
        rate = float(loop(dtype))
        if rate > peak[dtype]:
            peak[dtype], method[dtype] = rate, "register-only loop of the extension"


def measure(device: str = "cpu", *, quick: bool = False) -> Ceilings:
    """All ceilings of ``device``; about 4 s, with ``quick`` about 2 s."""
    sizes = WORKING_SETS if device == "cpu" else DEVICE_WORKING_SETS
    bandwidth = measure_bandwidth(device, sizes, budget=0.01 if quick else 0.05)
    peak, method = measure_peak(device, budget=0.05 if quick else 0.15)
    return Ceilings(bandwidth, peak, method)


class DriftProbe:
    """A fraction of a second of streaming and arithmetic whose change tells that the machine has changed.

    ``probe()`` returns (bytes/s, flop/s); :func:`drift` compares two of them.
    """

    def __init__(self, device: str = "cpu") -> None:
        import torch

        self._synchronize = _synchronizer(device)
        # On a GPU so large that draining it does not count.
        size, self._side = (4 << 20, 512) if device == "cpu" else (256 << 20, 4096)
        self._source = torch.ones(size, device=device)
        self._sink = torch.empty_like(self._source)
        self._a = torch.randn(self._side, self._side, device=device)
        self._out = torch.empty_like(self._a)

    def __call__(self) -> tuple[float, float]:
        import torch

        stream = _best_seconds(lambda: self._sink.copy_(self._source), self._synchronize, 0.03, least=8)
        product = _best_seconds(
            lambda: torch.mm(self._a, self._a, out=self._out), self._synchronize, 0.02, least=8
        )
        return 2 * 4 * self._source.numel() / stream, 2.0 * self._side**3 / product


def drift(before: Sequence[float], after: Sequence[float]) -> float:
    """The largest relative change between two probes."""
    return max(abs(b / a - 1.0) for a, b in zip(before, after, strict=True))


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _isa() -> str:
    try:
        from gptcore import backend

        return str(backend.isa())
    except (ImportError, AttributeError) as error:
        return f"unknown ({error})"


def _driver() -> int | None:
    from gptcore import backend

    cuda = backend.cuda_extension()
    return cuda.driver_version() if cuda else None


def describe(device: str, allocator: str, wait_policy: str) -> dict[str, Any]:
    """What a reader must know about the machine to use the figures."""
    import torch

    described = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": _isa(),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "wait_policy": wait_policy,
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return described


def summary(ceilings: Ceilings) -> str:
    """Two lines for people."""
    far = {kind: points[-1][1] / 1e9 for kind, points in ceilings.bandwidth.items()}
    near = {kind: points[0][1] / 1e9 for kind, points in ceilings.bandwidth.items()}
    streams = ", ".join(f"{kind} {far[kind]:.0f} (in cache {near[kind]:.0f})" for kind in ceilings.bandwidth)
    peaks = ", ".join(f"{d} {r / 1e9:.0f} GFLOP/s by {ceilings.method[d]}" for d, r in ceilings.peak.items())
    return f"bandwidth GB/s: {streams}\npeak: {peaks}"


if __name__ == "__main__":
    sys.stdout.write(summary(measure()) + "\n")
