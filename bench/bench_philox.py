"""philox: random bits by counter, against torch's own generator filling as many words."""

from __future__ import annotations

from collections.abc import Callable

from bench.case import Callables, Case, Cost, Target


def _setup(count: int) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.philox import philox

        counters = target.randint(2**31, count, 4).to(torch.int32)
        room = torch.empty_like(counters)
        return {
            "gptcore": lambda: philox(counters, 1, out=room),
            "torch_eager": lambda: room.random_(-(2**31), 2**31),
        }

    return setup


def _cost(count: int) -> Callable[[int], Cost]:
    return lambda _element: Cost(0.0, 16.0 * count, 16.0 * count)


# Four million words: what dropout draws on 33 million scores; and a size that stays in cache.
CASES = [
    Case(
        f"philox/N{count}/forward",
        _setup(count),
        _cost(count),
        dtypes=("float32",),
        small=count < 10_000,
        tolerance=None,
    )
    for count in (4096, 1 << 20)
]
