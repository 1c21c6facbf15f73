"""What is measured: a case as a small declarative object, and how cases are found.

Each ``bench/bench_<suite>.py`` has a list ``CASES``. A case names its participants by a dictionary of
callables: ``gptcore`` is ours, ``gptcore_plain`` ours without the option that the case is about, every other
entry a peer. Names of peers that go through ``torch.compile`` contain ``compiled``, so that ``--quick`` can
leave them out.
"""

from __future__ import annotations

import fnmatch
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OURS = "gptcore"
# Our own call without the option that a case is about: what the option costs is their quotient.
PLAIN = "gptcore_plain"
DTYPES = ("float32", "bfloat16")
# Where a case is measured: sizes that say something of a processor say little of a GPU, and the other way round.
ON_GPU, ANYWHERE = ("cuda",), ("cpu", "cuda")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
# Suites that train whole models: minutes, not milliseconds.
STEP_SUITES = (
    "train_step", "memory", "recomputation", "neighbour", "shakespeare", "hf_train_step", "hf_generate", "reward_model"
)  # fmt: skip
# What runs without --suite: all but trainings that take many minutes, and what needs another library.
LEFT_OUT_BY_DEFAULT = ("shakespeare", "recomputation", "hf_train_step", "hf_generate", "reward_model")


@dataclass(frozen=True)
class Cost:
    """What a case must do at least: the denominator of its share of the limit.

    flops: floating-point operations, useful ones only (the causal half of attention is not counted).
    read, written: bytes that must cross the memory interface once.
    in_place: the bytes written are the bytes read, which saves the read for ownership of a copy.
    streams: bytes by kind, where work is made of streams of several kinds: together they are the bytes above.
    """

    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    in_place: bool = False
    streams: tuple[tuple[str, float], ...] = ()

    @property
    def bytes(self) -> float:
        return self.read + self.written

    @property
    def traffic(self) -> tuple[tuple[str, float], ...]:
        """(kind, bytes) of the streams whose measured bandwidths bound this case; the kinds of bench.machine."""
        if self.streams:
            return self.streams
        if self.in_place:
            return (("in_place", self.bytes),)
        return (("read" if self.written < 0.1 * self.bytes else "copy", self.bytes),)


@dataclass(frozen=True)
class Target:
    """Where a case runs: dtype and device, with makers of its random inputs, the same in every process."""

    dtype: str
    device: str = "cpu"
    seed: int = 1234
    data: str | None = None
    quick: bool = False
    _draws: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    def randn(
        self, *shape: int, grad: bool = False, scale: float = 1.0, dtype: str | None = None
    ) -> torch.Tensor:
        """Normal values times ``scale`` in this target's dtype or ``dtype``, with gradients if asked."""
        import torch

        values = torch.randn(*shape, generator=self._generator(), device=self.device) * scale
        return values.to(getattr(torch, dtype or self.dtype)).requires_grad_(grad)

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        """int64 values in [0, high)."""
        import torch

        return torch.randint(0, high, shape, generator=self._generator(), device=self.device)

    def _generator(self) -> torch.Generator:
        import torch

        return torch.Generator(self.device).manual_seed(self.seed + next(self._draws))


Callables = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Measured:
    """Result of a case that times itself: seconds per name and repeat, and extra fields for its record."""

    samples: dict[str, list[float]]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    name: ``<suite>/<shape and options>/<forward | forward_backward | ...>``.
    setup: target -> callables by name. With ``heavy`` the values are factories instead: calling one
        builds the participant and returns the callable, so that only the finalists are in memory together.
    cost: element size in bytes -> Cost.
    repeats: timed samples for each participant.
    small: an operation of microseconds; also measured under OpenMP's default wait policy.
    quick: part of ``--quick``; a dtype: in that one only.
    cold: flush the caches before each call.
    tolerance: largest accepted relative difference (2-norm) between our results and the first peer's, by
        dtype; None where results are not comparable. It catches a broken kernel, no more: the peer's own
        error counts too (torch sums layer_norm's bf16 weight gradient 5% off at 4,096 rows).
    footnotes: peers that do less than asked for (their text says what); they are shown, not judged against.
    target_ms: a promised time in place of the roofline, in milliseconds.
    tokens: tokens per call, for tokens/s.
    once: under one allocator setting is enough, that of users who care for speed: it is not about calls' time.
    measure: takes over the timing altogether (target, progress) -> Measured.
    devices: where it is measured.
    """

    name: str
    setup: Callable[[Target], Callables] | None = None
    cost: Callable[[int], Cost] = lambda _element_bytes: Cost()
    dtypes: Sequence[str] = DTYPES
    repeats: int = 20
    small: bool = False
    quick: bool | str = True
    cold: bool = False
    heavy: bool = False
    tolerance: Mapping[str, float] | None = field(default_factory=lambda: {"float32": 1e-3, "bfloat16": 1e-1})
    footnotes: Mapping[str, str] = field(default_factory=dict)
    target_ms: float | None = None
    tokens: int = 0
    once: bool = False
    measure: Callable[[Target, Callable[[str], None]], Measured] | None = None
    devices: Sequence[str] = ("cpu",)

    @property
    def suite(self) -> str:
        return self.name.split("/", 1)[0]

    def matches(self, patterns: Iterable[str], dtype: str) -> bool:
        """Whether any glob fits the name, or the name with the dtype behind it, or is part of the name."""
        full = f"{self.name}/{dtype}"
        return any(fnmatch.fnmatch(full, p) or fnmatch.fnmatch(self.name, p) or p in full for p in patterns)


def suites() -> list[str]:
    """Names of all suites: the suffixes of the files ``bench_<suite>.py``."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def default_suites() -> list[str]:
    return [suite for suite in suites() if suite not in LEFT_OUT_BY_DEFAULT]


def load(suite: str) -> list[Case]:
    """The cases of one suite, in the order of its file."""
    cases = importlib.import_module(f"bench.bench_{suite}").CASES
    for case in cases:
        if case.suite != suite:
            raise ValueError(
                f"case '{case.name}' stands in bench_{suite}.py: its name must start with '{suite}/'"
            )
    return list(cases)


def with_gradient(function: Callable[..., Any], inputs: Sequence[Any], grad_output: Any) -> Callable[[], Any]:
    """A call of ``function(*inputs)`` and of the gradient with respect to every input that wants one.

    ``grad_output`` may be None for a scalar result. Gradients are returned, not accumulated, so that
    repeats do equal work.
    """
    import torch

    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def run() -> tuple[Any, ...]:
        output = function(*inputs)
        return (output, *torch.autograd.grad(output, wanted, grad_output))

    return run


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` at fixed shapes, as a user who cares for speed calls it."""
    import torch

    return torch.compile(function, dynamic=False)


def both_directions(
    functions: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Any],
    grad_output: Any = None,
    *,
    backward: bool,
) -> dict[str, Callable[[], Any]]:
    """Callables of a case from plain functions of the same inputs, with compiled twins of torch's.

    Every function whose name starts with ``torch`` gets a twin, ``eager`` in its name made ``compiled``.
    With ``backward`` each call also takes gradients; without it inputs are detached first.
    """
    import torch

    if not backward:
        inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    twins = dict(functions)
    for name, function in functions.items():
        if name.startswith("torch") and "compiled" not in name:
            twins[name.replace("eager", "compiled")] = compiled(function)
    if backward:
        return {name: with_gradient(function, inputs, grad_output) for name, function in twins.items()}
    return {name: _bound(function, inputs) for name, function in twins.items()}


def _bound(function: Callable[..., Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    return lambda: function(*inputs)
