"""What a side of ``bench.ppo`` writes down of its run, the same for both: times, rewards and memory."""

from __future__ import annotations

import itertools
import json
import resource
import time
from pathlib import Path


class Record:
    """Made after the imports, whose memory is not the trainer's doing; told of each iteration's scores."""

    def __init__(self) -> None:
        self.imports = _resident()
        self.moments: list[tuple[float, float]] = []
        self.rewards: list[float] = []

    def judged(self, scores: list[float]) -> None:
        """An iteration has been sampled and judged; from here to the next time is what all of one costs."""
        self.moments.append((time.perf_counter(), time.process_time()))
        self.rewards.append(sum(scores) / len(scores))

    def finish(self) -> str:
        """One JSON object: wall and processor ``seconds`` between judgements, one less than iterations, ``rewards``,
        the peak of resident memory, and what of it lay there after the imports."""
        wall, processor = (
            [b - a for a, b in itertools.pairwise(some)] for some in zip(*self.moments, strict=True)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return json.dumps({
            "seconds": wall, "processor_seconds": processor, "rewards": self.rewards, "peak_mib": peak,
            "imports_mib": self.imports,
        })  # fmt: skip


def _resident() -> float:
    """MiB of this process that lie in memory."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no line VmRSS")
