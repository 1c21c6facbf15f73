"""GELU, SiLU, SwiGLU and GEGLU at GPT-2's and LLaMA's feed-forward widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import ANYWHERE, ON_GPU, Callables, Case, Cost, Target, both_directions


def _functions(kind: str) -> dict[str, Callable[..., Any]]:
    """Ours and torch's for one activation."""
    import torch.nn.functional as F

    from gptcore.ops import gated_activation as ours

    return {
        "gelu_tanh": {
            "gptcore": lambda x: ours.gelu(x, approximate="tanh"),
            "torch_eager": lambda x: F.gelu(x, approximate="tanh"),
        },
        "gelu_erf": {
            "gptcore": lambda x: ours.gelu(x, approximate="none"),
            "torch_eager": lambda x: F.gelu(x),
        },
        "gelu_tanh_bias": {
            "gptcore": lambda x, b: ours.gelu(x, b, approximate="tanh"),
            "torch_eager": lambda x, b: F.gelu(x + b, approximate="tanh"),
        },
        "silu": {"gptcore": lambda x: ours.silu(x), "torch_eager": lambda x: F.silu(x)},
        "relu": {"gptcore": lambda x: ours.relu(x), "torch_eager": lambda x: F.relu(x)},
        "swiglu": {
            "gptcore": lambda gate, up: ours.swiglu(gate, up),
            "torch_eager": lambda gate, up: F.silu(gate) * up,
        },
        "geglu": {
            "gptcore": lambda gate, up: ours.geglu(gate, up),
            "torch_eager": lambda gate, up: F.gelu(gate) * up,
        },
    }[kind]


def _setup(kind: str, rows: int, width: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        inputs = [target.randn(rows, width, grad=True)]
        if kind.endswith("bias"):
            inputs.append(target.randn(width, grad=True))
        elif kind in ("swiglu", "geglu"):
            inputs.append(target.randn(rows, width, grad=True))
        return both_directions(_functions(kind), inputs, target.randn(rows, width), backward=backward)

    return setup


def _cost(kind: str, rows: int, width: int, *, backward: bool) -> Callable[[int], Cost]:
    """Forward reads its inputs, writes one array; backward reads them and dy, writes their gradients."""
    n, inputs = rows * width, 2 if kind in ("swiglu", "geglu") else 1

    def cost(element: int) -> Cost:
        read = inputs * n + ((inputs + 1) * n if backward else 0)
        written = n + (inputs * n if backward else 0)
        return Cost((10 + (15 if backward else 0)) * n, read * element, written * element)

    return cost


SHAPES = (
    ("gelu_tanh", 64, 64), ("gelu_tanh", 1024, 3072), ("gelu_tanh", 4096, 3072),
    ("gelu_tanh_bias", 4096, 3072), ("gelu_erf", 4096, 3072), ("silu", 4096, 3072),
    ("relu", 4096, 3072),
    ("swiglu", 64, 64), ("swiglu", 2048, 11008),
    ("geglu", 2048, 2048),
)  # fmt: skip
GPU_SHAPES = (("gelu_tanh_bias", 16384, 6400), ("swiglu", 16384, 11008))


def _cases() -> list[Case]:
    cases = []
    for kind, rows, width in (*SHAPES, *GPU_SHAPES):
        for backward in (False, True):
            name = f"gated_activation/{kind}_{rows}x{width}/{'forward_backward' if backward else 'forward'}"
            setup = _setup(kind, rows, width, backward=backward)
            cost = _cost(kind, rows, width, backward=backward)
            quick = backward and kind in ("gelu_tanh", "swiglu") and rows != 4096
            devices = ON_GPU if rows == 16384 else ANYWHERE if rows == 64 else ("cpu",)
            cases.append(Case(name, setup, cost, small=rows == 64, quick=quick, devices=devices))
    return cases


CASES = _cases()
