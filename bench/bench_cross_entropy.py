"""cross_entropy on given logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import ON_GPU, Callables, Case, Cost, Target, both_directions


def _setup(
    tokens: int, vocabulary: int, smoothing: float, *, backward: bool
) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch.nn.functional as F

        from gptcore.ops.cross_entropy import cross_entropy

        targets = target.randint(vocabulary, tokens)
        logits = target.randn(tokens, vocabulary, grad=True)
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": lambda x: cross_entropy(x, targets, label_smoothing=smoothing),
            "torch_eager": lambda x: F.cross_entropy(x.float(), targets, label_smoothing=smoothing),
        }
        if target.dtype != "float32":
            functions["torch_bf16_eager"] = lambda x: F.cross_entropy(x, targets, label_smoothing=smoothing)
        return both_directions(functions, [logits], backward=backward)

    return setup


def _cost(tokens: int, vocabulary: int, *, backward: bool) -> Callable[[int], Cost]:
    """Forward reads the logits; backward reads them again and writes their gradient."""
    n = tokens * vocabulary
    return lambda element: Cost(
        (10 + (5 if backward else 0)) * n,
        (2 if backward else 1) * n * element,
        n * element if backward else 0,
    )


SHAPES = ((64, 64, 0.0), (1024, 50257, 0.0), (1024, 50257, 0.1))
GPU_SHAPE = (8192, 50257, 0.0)


def _cases() -> list[Case]:
    cases = []
    for tokens, vocabulary, smoothing in (*SHAPES, GPU_SHAPE):
        for backward in (False, True):
            label = f"N{tokens}_V{vocabulary}" + ("_smoothing" if smoothing else "")
            cases.append(
                Case(
                    f"cross_entropy/{label}/{'forward_backward' if backward else 'forward'}",
                    _setup(tokens, vocabulary, smoothing, backward=backward),
                    _cost(tokens, vocabulary, backward=backward),
                    small=tokens == 64,
                    quick=backward and not smoothing and tokens < 8192,
                    devices=ON_GPU if tokens == 8192 else ("cpu",),
                )
            )
    return cases


CASES = _cases()
