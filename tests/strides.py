"""Inputs and gradients that lie inside larger tensors: misaligned, with gaps between rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

EDGES = st.tuples(st.integers(0, 5), st.integers(0, 3))
"""Elements before and after each row."""


def within_larger(function: Callable[..., Any], edges: tuple[int, int]) -> Callable[..., Any]:
    """``function`` of float tensors, called with views of tensors whose last dimension has ``edges`` more elements.

    Its results become such views too, so their gradients arrive as views. Tensors of one dimension are only
    misaligned. Differentiable; values and gradients are those of ``function``.
    """
    before, after = edges

    def view(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.nn.functional.pad(x, (before, after))[..., before : before + x.shape[-1]]

    def embedded(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (before, after)) if x.ndim else x

    def call(*inputs: Any) -> Any:
        result = function(*map(view, inputs))
        return tuple(map(embedded, result)) if isinstance(result, tuple) else embedded(result)

    return call
