"""grad_norm: the global norm of a model's gradients and the check for infinities and NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.bench_adamw import gpt2_shapes, parameters
from bench.case import Callables, Case, Cost, Target


def _setup(shapes: Sequence[tuple[int, ...]]) -> Callable[[Target], Callables]:
    """torch's norm alone: a peer that also looked for NaN would read everything twice."""

    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.grad_norm import grad_norm

        grads = [target.randn(*shape, scale=1e-3) for shape in shapes]

        def ours() -> torch.Tensor:
            return torch.tensor(grad_norm(grads)[0])

        return {
            "gptcore": ours,
            "torch_eager": lambda: torch.nn.utils.get_total_norm(grads, foreach=True).float(),
        }

    return setup


def _cost(shapes: Sequence[tuple[int, ...]]) -> Callable[[int], Cost]:
    count = parameters(shapes)
    return lambda element: Cost(2.0 * count, element * count)


_GPT2 = gpt2_shapes()
_MANY = [(64, 64)] * 1000

CASES = [
    Case("grad_norm/gpt2_124m/forward", _setup(_GPT2), _cost(_GPT2), quick=False),
    Case("grad_norm/1000_tensors_64x64/forward", _setup(_MANY), _cost(_MANY)),
]
