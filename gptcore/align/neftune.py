"""NEFTune: noise on embeddings while fine-tuning (Jain et al. 2023, arXiv 2310.05914)."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gptcore.errors import UserError
from gptcore.models import GPT


class EmbeddingNoise:
    """Uniform noise in ±α/√(T·C) on each embedding of ``model`` in training; use it in ``with``.

    T is the length of the token's own sequence, whatever else is packed beside it, C the width. In ``eval`` mode there
    is none. It is drawn from torch's generator, which training seeds for every leaf of every update: so a resumed run
    draws what the run that never stopped did, and so does any number of ranks.

    Raises:
        UserError: ``alpha`` that is negative or not finite.
    """

    def __init__(self, model: GPT, alpha: float) -> None:
        if not 0.0 <= alpha < math.inf:
            raise UserError(f"neftune_alpha: got {alpha}, expected 0 or more")
        self._model, self._alpha = model, alpha
        self._bounds: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> EmbeddingNoise:
        if self._alpha:
            hooked = self._model.register_forward_pre_hook(self._see, with_kwargs=True)
            self._handles = [hooked, self._model.token_embedding.register_forward_hook(self._add)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, model: torch.nn.Module, args: Any, options: dict[str, Any]) -> None:
        """The sequences of the pass that begins."""
        self._bounds = options.get("cu_seqlens")

    def _add(self, embedding: torch.nn.Module, args: tuple[Tensor], x: Tensor) -> Tensor:
        if not self._model.training:
            return x
        noise = torch.empty(x.shape, dtype=torch.float32, device=x.device).uniform_(-1.0, 1.0)
        return x + (noise * self._scale(x)).to(x.dtype)

    def _scale(self, x: Tensor) -> Tensor:
        """α/√(T·C) for each row of ``x`` (N, C), or one number for (B, T, C)."""
        width = x.shape[-1]
        if self._bounds is None:
            return torch.tensor(self._alpha / math.sqrt(x.shape[-2] * width), device=x.device)
        lengths = self._bounds.diff().to(torch.int64)
        return (self._alpha / (lengths * width).float().sqrt()).repeat_interleave(lengths)[:, None]
