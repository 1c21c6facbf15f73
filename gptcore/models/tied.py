"""A table that is both embedding and head: one gradient in place of the sum of two.

Autograd alone would make the head's gradient (V, C), the embedding's, as large and mostly zero, and their sum.
Here the embedding's rows are added into the head's gradient where it lies: a few thousand rows instead of three
passes over the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcore import ops
from gptcore.nn.support import is_watched, served


class TiedTable:
    """Both uses of the table ``weight`` (V, C) in one forward pass that ends in a loss.

    The head's backward runs first, since all else depends on it: it leaves its gradient here and gives autograd
    none. The embedding's, which runs last, adds its rows to what it finds and gives that; where it finds nothing,
    as when only the hidden states are differentiated, it makes the gradient itself.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.has_rows = False
        self._gradient: Tensor | None = None

    @staticmethod
    def serves(embedding: torch.nn.Embedding) -> bool:
        """Whether the weight of ``embedding``, which runs on our kernel, may be used so: in plain eager training.

        Whatever else wants to see the two uses apart keeps autograd's own sum: a compiler, functorch, a
        dispatch mode, a tensor subclass, who watches the embedding, a ``main_grad`` that collects gradients itself.
        """
        weight = embedding.weight
        return (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and weight.requires_grad
            and embedding.padding_idx is None  # whose row has no gradient as an embedding
            and type(weight) in (Tensor, torch.nn.Parameter)
            and served("embedding", weight)
            and getattr(weight, "main_grad", None) is None
            and torch._C._functorch.peek_interpreter_stack() is None
            and not torch._C._len_torch_dispatch_stack()
            and not is_watched(embedding)
        )

    def rows(self, tokens: Tensor) -> Tensor:
        """(..., C): the embeddings of ``tokens`` (...)."""
        self.has_rows = True
        return _Rows.apply(self.weight, tokens, self)

    def head(self) -> Tensor:
        """The table as the head sees it. Its gradient may be written to, and reaches ``weight`` by ``rows``, which must
        have been called in the same forward pass."""
        return _Head.apply(self.weight, self)

    def keep(self, gradient: Tensor) -> None:
        """Take the head's gradient (V, C)."""
        self._gradient = gradient

    def add_rows(self, tokens: Tensor, dy: Tensor) -> Tensor:
        """The gradient (V, C) of both uses, or of the embedding alone; what was kept is given away."""
        gradient, self._gradient = self._gradient, None
        return ops.embedding_backward(tokens, dy, self.weight.shape[0], accumulate_into=gradient)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, table: TiedTable) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.table = table
        return ops.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        return ctx.table.add_rows(tokens, dy), None, None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: TiedTable) -> Tensor:
        ctx.table = table
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.table.keep(gradient)
        return None, None
