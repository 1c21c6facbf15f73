"""Tokens to their experts and back, against torch's gather and index_add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import Callables, Case, Cost, Target

TOKENS, TOP_K, WIDTH = 4096, 2, 768


def _setup(experts: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops import moe_combine, moe_dispatch, moe_router

        x, grad = target.randn(TOKENS, WIDTH, grad=backward), target.randn(TOKENS, WIDTH)
        routing = moe_router(target.randn(TOKENS, experts).float())
        gates = routing.gates
        order = torch.argsort(routing.experts.flatten(), stable=True)
        token, sorted_gates = order // TOP_K, gates.flatten()[order][:, None].to(x.dtype)

        def ours() -> Any:
            there = moe_dispatch(x, routing.rows, routing.offsets)
            return moe_combine(there, routing.rows, routing.offsets, gates)

        def theirs() -> Any:
            there = x[token]
            return torch.zeros_like(x).index_add(0, token, there * sorted_gates)

        def call(function: Callable[[], Any]) -> Callable[[], object]:
            return (lambda: torch.autograd.grad(function(), x, grad)) if backward else function

        return {"gptcore": call(ours), "torch_eager": call(theirs)}

    return setup


def _cost(*, backward: bool) -> Callable[[int], Cost]:
    """Forward: N rows read, N K written, N K read, N written; backward likewise the other way round."""

    def cost(element: int) -> Cost:
        rows = TOKENS * (TOP_K + 1) * WIDTH * element * (2 if backward else 1)
        return Cost(0, rows, rows)

    return cost


CASES = [
    Case(
        f"moe_dispatch/N{TOKENS}_C{WIDTH}_E{experts}_K{TOP_K}/{'forward_backward' if backward else 'forward'}",
        _setup(experts, backward=backward),
        _cost(backward=backward),
        quick=False,
    )
    for experts in (8, 64, 256)
    for backward in (False, True)
]
