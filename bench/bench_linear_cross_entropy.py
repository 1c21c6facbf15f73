"""linear_cross_entropy: the vocabulary projection with its loss, logits never whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import Callables, Case, Cost, Target, both_directions


def _setup(
    tokens: int, width: int, vocabulary: int, z_loss: float, *, backward: bool
) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch
        import torch.nn.functional as F

        from gptcore.ops.linear_cross_entropy import linear_cross_entropy

        targets = target.randint(vocabulary, tokens)

        def ours(x: Any, weight: Any) -> Any:
            result = linear_cross_entropy(x, weight, targets, z_loss=z_loss)
            return result.loss + result.z_loss if z_loss else result.loss

        def plain(x: Any, weight: Any, *, in_f32: bool) -> Any:
            logits = F.linear(x, weight)
            logits = logits.float() if in_f32 else logits
            loss = F.cross_entropy(logits, targets)
            return loss + z_loss * torch.logsumexp(logits, -1).square().mean() if z_loss else loss

        inputs = [target.randn(tokens, width, grad=True)]
        inputs.append(target.randn(vocabulary, width, grad=True, scale=width**-0.5))
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": ours,
            "torch_eager": lambda x, weight: plain(x, weight, in_f32=True),
        }
        if target.dtype != "float32":
            functions["torch_bf16_loss_eager"] = lambda x, weight: plain(x, weight, in_f32=False)
        return both_directions(functions, inputs, backward=backward)

    return setup


def _cost(tokens: int, width: int, vocabulary: int, *, backward: bool) -> Callable[[int], Cost]:
    """One product forward, two backward; x, weight and their gradients cross memory once."""
    product = 2.0 * tokens * width * vocabulary
    operands = (tokens + vocabulary) * width

    def cost(element: int) -> Cost:
        written = operands * element if backward else 0
        return Cost((3 if backward else 1) * product, (2 if backward else 1) * operands * element, written)

    return cost


SHAPES = ((64, 64, 64, 0.0), (1024, 768, 50257, 0.0), (1024, 768, 50257, 1e-4), (512, 2048, 32000, 0.0))


def _cases() -> list[Case]:
    cases = []
    for tokens, width, vocabulary, z_loss in SHAPES:
        for backward in (False, True):
            label = f"N{tokens}_C{width}_V{vocabulary}" + ("_zloss" if z_loss else "")
            cases.append(
                Case(
                    f"linear_cross_entropy/{label}/{'forward_backward' if backward else 'forward'}",
                    _setup(tokens, width, vocabulary, z_loss, backward=backward),
                    _cost(tokens, width, vocabulary, backward=backward),
                    small=tokens == 64,
                    quick=backward and width in (64, 768) and not z_loss,
                )
            )
    return cases


CASES = _cases()
