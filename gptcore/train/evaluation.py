"""Held-out loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Batches(Protocol):
    """A loader as training and evaluation see it: the batch is a pure function of its index."""

    def batch_at(self, step: int) -> Any:
        """``tokens`` and ``targets`` (B, T), and ``cu_seqlens`` or None; NumPy arrays."""
        ...


def tensors_of(batch: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """tokens (B, T) int64, targets (B, T) int64, cu_seqlens int32 or None, on ``device``."""
    tokens = torch.as_tensor(batch.tokens).to(device, torch.int64)
    targets = torch.as_tensor(batch.targets).to(device, torch.int64)
    bounds = getattr(batch, "cu_seqlens", None)
    return tokens, targets, None if bounds is None else torch.as_tensor(bounds).to(device, torch.int32)


def held_out(
    loader: Batches, batches: int, *, bytes_per_token: float | None = None
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """An ``evaluate`` for training: the mean loss in nats per token over the same batches every time.

    ``bytes_per_token`` of the held-out text (its UTF-8 bytes over its tokens) gives bits per byte,
    loss / ln 2 / bytes_per_token, which compares models whatever their tokenizers.
    """

    @torch.no_grad()
    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for index in range(batches):
            tokens, targets, bounds = tensors_of(loader.batch_at(index), device)
            options = {} if bounds is None else {"cu_seqlens": bounds}
            seen = int((targets >= 0).sum())
            total += float(model(tokens, targets, **options).loss) * seen
            count += seen
        loss = total / max(1, count)
        result = {"val_loss": loss}
        if bytes_per_token is not None:
            result["val_bits_per_byte"] = loss / math.log(2) / bytes_per_token
        return result

    return evaluate
