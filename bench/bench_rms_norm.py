"""rms_norm, with and without the residual addition in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import ANYWHERE, ON_GPU, Callables, Case, Cost, Target, both_directions

EPS = 1e-6


def _setup(rows: int, width: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.rms_norm import rms_norm

        inputs = [target.randn(rows, width, grad=True), target.randn(width, grad=True)]
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": lambda x, w: rms_norm(x, w, EPS),
            "torch_eager": lambda x, w: torch.nn.functional.rms_norm(x, (width,), w, EPS),
        }
        return both_directions(functions, inputs, target.randn(rows, width), backward=backward)

    return setup


def _setup_zero_centred(rows: int, width: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.rms_norm import rms_norm

        def eager(x: Any, w: Any) -> Any:
            # 1 + weight in bf16 is not the same function, but the cheaper one.
            return torch.nn.functional.rms_norm(x, (width,), 1 + w, EPS)

        inputs = [target.randn(rows, width, grad=True), target.randn(width, grad=True)]
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": lambda x, w: rms_norm(x, w, EPS, weight_offset=1.0),
            "torch_eager": eager,
        }
        return both_directions(functions, inputs, target.randn(rows, width), backward=backward)

    return setup


def _setup_residual(rows: int, width: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.rms_norm import rms_norm

        def eager(x: Any, residual: Any, w: Any) -> tuple[Any, Any]:
            h = x + residual
            return torch.nn.functional.rms_norm(h, (width,), w, EPS), h

        inputs = [target.randn(rows, width, grad=True) for _ in range(2)] + [target.randn(width, grad=True)]
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": lambda x, r, w: rms_norm(x, w, EPS, residual=r),
            "torch_eager": eager,
        }
        grads = (target.randn(rows, width), target.randn(rows, width))
        return both_directions(functions, inputs, grads, backward=backward)

    return setup


def _cost(rows: int, width: int, *, backward: bool, residual: bool = False) -> Callable[[int], Cost]:
    """Forward reads x, writes y; backward reads x and dy, writes dx; a residual adds one array each way."""
    n = rows * width
    extra = n if residual else 0

    def cost(element: int) -> Cost:
        read = (n + extra) + (2 * n + extra if backward else 0)
        written = (n + extra) + (n if backward else 0)
        return Cost((5 + (11 if backward else 0)) * n, read * element, written * element)

    return cost


# 256 rows of 768 and what backward adds to them stay in the L2 caches of two cores.
SHAPES = ((64, 64), (256, 768), (1024, 768), (4096, 768), (2048, 4096), (16384, 4096))
# From what a block of threads takes at once to what needs several.
GPU_SHAPES = ((16384, 1024), (16384, 8192), (4096, 32768))


def _cases() -> list[Case]:
    cases = []
    for rows, width in (*SHAPES, *GPU_SHAPES):
        small = rows * width <= 4096
        for backward in (False, True):
            direction = "forward_backward" if backward else "forward"
            devices = ON_GPU if (rows, width) in GPU_SHAPES else ANYWHERE if rows in (64, 16384) else ("cpu",)
            quick = rows * width == 4096 * 768 or (small and backward)
            setup = _setup(rows, width, backward=backward)
            cost = _cost(rows, width, backward=backward)
            name = f"rms_norm/{rows}x{width}/{direction}"
            cases.append(Case(name, setup, cost, small=small, quick=quick, devices=devices))
    for backward in (False, True):
        direction = "forward_backward" if backward else "forward"
        for rows, devices in ((2048, ("cpu",)), (16384, ON_GPU)):
            setup = _setup_residual(rows, 4096, backward=backward)
            cost = _cost(rows, 4096, backward=backward, residual=True)
            name = f"rms_norm/{rows}x4096_residual/{direction}"
            cases.append(Case(name, setup, cost, quick=False, devices=devices))
        setup = _setup_zero_centred(4096, 768, backward=backward)
        cost = _cost(4096, 768, backward=backward)
        cases.append(Case(f"rms_norm/4096x768_zero_centred/{direction}", setup, cost, quick=False))
    return cases


CASES = _cases()
