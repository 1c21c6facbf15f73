"""layer_norm, with and without the residual addition in front of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.case import ANYWHERE, ON_GPU, Callables, Case, Cost, Target, both_directions, compiled

EPS = 1e-5


def _setup(rows: int, width: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.layer_norm import layer_norm

        inputs = [target.randn(rows, width, grad=True)]
        inputs += [target.randn(width, grad=True) for _ in range(2)]
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": lambda x, w, b: layer_norm(x, w, b, EPS),
            "torch_eager": lambda x, w, b: torch.nn.functional.layer_norm(x, (width,), w, b, EPS),
        }
        return both_directions(functions, inputs, target.randn(rows, width), backward=backward)

    return setup


def _setup_residual(rows: int, width: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.layer_norm import layer_norm

        def eager(x: Any, residual: Any, w: Any, b: Any) -> tuple[Any, Any]:
            h = x + residual
            return torch.nn.functional.layer_norm(h, (width,), w, b, EPS), h

        inputs = [target.randn(rows, width, grad=True) for _ in range(2)]
        inputs += [target.randn(width, grad=True) for _ in range(2)]
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": lambda x, r, w, b: layer_norm(x, w, b, EPS, residual=r),
            "torch_eager": eager,
        }
        grads = (target.randn(rows, width), target.randn(rows, width))
        return both_directions(functions, inputs, grads, backward=backward)

    return setup


def _setup_out(rows: int, width: int) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.layer_norm import layer_norm

        x, w, b = target.randn(rows, width), target.randn(width), target.randn(width)
        out = torch.empty_like(x)

        def eager() -> Any:
            return torch.nn.functional.layer_norm(x, (width,), w, b, EPS)

        calls = {"gptcore": lambda: layer_norm(x, w, b, EPS, out=out), "torch_eager": eager}
        return calls | {"torch_compiled": compiled(eager)}

    return setup


def _cost(rows: int, width: int, *, backward: bool, residual: bool = False) -> Callable[[int], Cost]:
    """Forward reads x, writes y; backward reads x and dy, writes dx; a residual adds one array each way."""
    n = rows * width
    extra = n if residual else 0

    def cost(element: int) -> Cost:
        read = (n + extra) + (2 * n + extra if backward else 0)
        written = (n + extra) + (n if backward else 0)
        return Cost((8 + (15 if backward else 0)) * n, read * element, written * element)

    return cost


# torch's error in the bf16 weight gradient grows with the rows; the page of layer_norm has both errors.
MANY_ROWS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-1}
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
            name = f"layer_norm/{rows}x{width}/{direction}"
            case = Case(name, setup, cost, small=small, quick=quick, devices=devices)
            cases.append(replace(case, tolerance=MANY_ROWS_TOLERANCE) if rows >= 16384 else case)
    for backward in (False, True):
        direction = "forward_backward" if backward else "forward"
        for rows, width, devices in ((4096, 768, ("cpu",)), (16384, 4096, ON_GPU)):
            setup = _setup_residual(rows, width, backward=backward)
            cost = _cost(rows, width, backward=backward, residual=True)
            name = f"layer_norm/{rows}x{width}_residual/{direction}"
            case = Case(name, setup, cost, quick=backward, devices=devices)
            cases.append(replace(case, tolerance=MANY_ROWS_TOLERANCE) if rows == 16384 else case)
    cases.append(
        Case("layer_norm/64x64_out/forward", _setup_out(64, 64), _cost(64, 64, backward=False), small=True)
    )
    return cases


CASES = _cases()
