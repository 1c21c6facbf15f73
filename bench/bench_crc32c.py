"""crc32c: the checksum of a message, and the copy with it, against torch's plain copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable

from bench.case import Callables, Case, Cost, Target


def _setup(count: int, copies: bool) -> Callable[[Target], Callables]:
    """No peer takes a checksum in torch: its copy says what reading and writing alone take."""

    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.crc32c import crc32c

        x = target.randn(count)
        room, other = torch.zeros_like(x), torch.zeros_like(x)

        def ours() -> torch.Tensor:
            crc32c(x, out=room if copies else None)
            return room

        return {"gptcore": ours, "torch_eager": lambda: other.copy_(x)}

    return setup


def _cost(count: int, copies: bool) -> Callable[[int], Cost]:
    return lambda element: Cost(0.0, element * count, element * count * copies)


# GPT-2's weights, in memory, and a megabyte that stays in the second-level cache.
CASES = [
    Case(
        f"crc32c/N{count}/{'copy' if copies else 'read'}",
        _setup(count, copies),
        _cost(count, copies),
        dtypes=("float32",),
        tolerance=None,
        quick=count < 1 << 20,
    )
    for count in (1 << 18, 124 << 20)
    for copies in (False, True)
]
