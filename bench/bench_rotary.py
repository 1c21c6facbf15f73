"""Rotary position embedding, both layouts, against the expressions that model code uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import ANYWHERE, ON_GPU, Callables, Case, Cost, Target, both_directions


def rotate_halves(x: Any, cos: Any, sin: Any) -> Any:
    """GPT-NeoX's layout: the first half of D pairs with the second. x (B, T, H, D), cos and sin (T, D/2)."""
    import torch

    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[None, :, None, :].to(x.dtype), sin[None, :, None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_pairs(x: Any, cos: Any, sin: Any) -> Any:
    """GPT-J's layout: neighbours pair, as complex numbers, which is torch's fastest expression in f32."""
    import torch

    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.complex(cos, sin)[None, :, None, :]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _setup(shape: tuple[int, ...], *, interleaved: bool, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        from gptcore.ops.rotary import rotary, rotary_tables

        cos, sin = rotary_tables(shape[1], shape[3])
        x = target.randn(*shape, grad=True)
        functions: dict[str, Callable[..., Any]] = {
            "gptcore": lambda x: rotary(x, cos, sin, interleaved=interleaved),
            "torch_eager": lambda x: (rotate_pairs if interleaved else rotate_halves)(x, cos, sin),
        }
        return both_directions(functions, [x], target.randn(*shape), backward=backward)

    return setup


def _cost(shape: tuple[int, ...], *, backward: bool) -> Callable[[int], Cost]:
    """Each direction reads and writes x once; the tables stay in cache."""
    n = shape[0] * shape[1] * shape[2] * shape[3]
    passes = 2 if backward else 1
    return lambda element: Cost(3 * passes * n, passes * n * element, passes * n * element)


SHAPES = ((1, 64, 1, 64), (2, 512, 12, 64), (1, 2048, 32, 128))
GPU_SHAPE = (4, 4096, 32, 128)


def _cases() -> list[Case]:
    cases = []
    for shape in (*SHAPES, GPU_SHAPE):
        label = "B{}_T{}_H{}_D{}".format(*shape)
        small = shape[1] == 64
        for interleaved in (False, True):
            if small and interleaved:
                continue
            layout = "interleaved" if interleaved else "halves"
            for backward in (False, True):
                cases.append(
                    Case(
                        f"rotary/{label}_{layout}/{'forward_backward' if backward else 'forward'}",
                        _setup(shape, interleaved=interleaved, backward=backward),
                        _cost(shape, backward=backward),
                        small=small,
                        quick=backward and not interleaved and shape[3] == 64,
                        devices=ON_GPU if shape == GPU_SHAPE else ANYWHERE if small else ("cpu",),
                    )
                )
    return cases


CASES = _cases()
