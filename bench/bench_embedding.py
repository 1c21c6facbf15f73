"""Embedding gather and its deterministic scatter-add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import ON_GPU, Callables, Case, Cost, Target, both_directions


def _setup(vocabulary: int, width: int, tokens: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.embedding import embedding

        ids = target.randint(vocabulary, tokens)
        weight = target.randn(vocabulary, width, grad=True)
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": lambda weight: embedding(ids, weight),
            "torch_eager": lambda weight: torch.nn.functional.embedding(ids, weight),
        }
        return both_directions(functions, [weight], target.randn(tokens, width), backward=backward)

    return setup


def _cost(vocabulary: int, width: int, tokens: int, *, backward: bool) -> Callable[[int], Cost]:
    """Forward copies the rows; backward clears the dense gradient (V, C) and adds dy into it."""
    n, table = tokens * width, vocabulary * width

    def cost(element: int) -> Cost:
        read = n + (2 * n if backward else 0)
        written = n + (table + n if backward else 0)
        return Cost(n if backward else 0, read * element, written * element)

    return cost


SHAPES = ((64, 64, 64), (50257, 768, 1024), (50257, 768, 8192))
GPU_SHAPE = (50257, 1600, 32768)


def _cases() -> list[Case]:
    cases = []
    for vocabulary, width, tokens in (*SHAPES, GPU_SHAPE):
        for backward in (False, True):
            direction = "forward_backward" if backward else "forward"
            name = f"embedding/V{vocabulary}_C{width}_N{tokens}/{direction}"
            setup = _setup(vocabulary, width, tokens, backward=backward)
            cost = _cost(vocabulary, width, tokens, backward=backward)
            quick = backward and tokens < 8192
            devices = ON_GPU if tokens == GPU_SHAPE[2] else ("cpu",)
            cases.append(Case(name, setup, cost, small=tokens == 64, quick=quick, devices=devices))
    return cases


CASES = _cases()
