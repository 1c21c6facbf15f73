"""Held-out loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Batches(Protocol):
    """A loader as training and evaluation see it: the batch is a pure function of its index."""

    def batch_at(self, step: int) -> Any:
        """``tokens`` and ``targets`` (B, T), and ``cu_seqlens`` and ``mask``, each where there is one; NumPy arrays.

        ``options``, a mapping, has further arrays that the model takes by name. ``weight`` multiplies a micro-batch's
        loss in its update (``gptcore.data.examples.leaf_weight``); 1 where a batch says none. A loader whose rows are
        not all full may have ``tokens_of_update(step)``, for the speed that is told.
        """
        ...


class Samples(Batches, Protocol):
    """A loader that serves any number of sequences from any on."""

    def samples(self, first: int, count: int) -> Any:
        """As a batch, sequences ``first`` to ``first + count - 1`` of the order."""
        ...


def tensors_of(
    batch: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """tokens and targets (B, T) int64, and the model's options: what the batch has of cu_seqlens (int32) and of a
    padding mask (B, T) (bool), and with their own dtypes the arrays of its ``options``, on ``device``."""
    tensors = {name: tensor.to(device) for name, tensor in host_tensors(batch).items()}
    return tensors.pop("tokens"), tensors.pop("targets"), tensors


def host_tensors(batch: Any) -> dict[str, torch.Tensor]:
    """The same by name, where they are."""
    tensors = {
        "tokens": torch.as_tensor(batch.tokens).to(torch.int64),
        "targets": torch.as_tensor(batch.targets).to(torch.int64),
    }
    for name, dtype in (("cu_seqlens", torch.int32), ("mask", torch.bool)):
        if (array := getattr(batch, name, None)) is not None:
            tensors[name] = torch.as_tensor(array).to(dtype)
    for name, array in (getattr(batch, "options", None) or {}).items():
        tensors[name] = torch.as_tensor(array)
    return tensors


def held_out(loader: Batches, batches: int) -> Callable[[torch.nn.Module], dict[str, float]]:
    """An ``evaluate`` for training: the mean over the targets of the first ``batches`` batches.

    ``val_loss`` is in nats per token. Batches that know their ``target_bytes`` (UTF-8 bytes of the
    targets) give ``val_bits_per_byte`` too, which compares models whatever their tokenizers.
    Ignored targets (negative) don't count. Models with experts give ``val_drop_rate``, the mean over batches and
    layers, at the capacity of evaluation.
    """

    @torch.no_grad()
    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        nats, tokens_seen, bytes_seen = 0.0, 0, 0
        drop_rates: list[float] = []
        for index in range(batches):
            batch = loader.batch_at(index)
            tokens, targets, options = tensors_of(batch, device)
            count = int(((targets >= 0) & options.get("mask", torch.tensor(True))).sum())
            out = model(tokens, targets, **options)
            nats += float(out.loss) * count if count else 0.0
            drop_rates.extend(float(layer.drop_rate) for layer in getattr(out, "routing", ()))
            tokens_seen += count
            bytes_seen += getattr(batch, "target_bytes", 0)
        result = {"val_loss": nats / max(1, tokens_seen)}
        if bytes_seen:
            result["val_bits_per_byte"] = nats / math.log(2) / bytes_seen
        if drop_rates:
            result["val_drop_rate"] = sum(drop_rates) / len(drop_rates)
        return result

    return evaluate
