"""Which parameters decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: matrices decay, everything else does not.

    The convention of the GPT-2 and GPT-3 training codes: whatever has two or more dimensions decays,
    which includes token and position embeddings; biases and the gains of norms have one and do not. The biases
    of experts, a row for each, do not either.
    Tied weights appear once. Parameters with ``requires_grad=False`` are left out. An empty group is
    left out too.

    Raises:
        ValueError: nothing to train, or a negative weight_decay.
    """
    if weight_decay < 0:
        raise ValueError(f"decay_groups: argument 'weight_decay': got {weight_decay}, expected 0 or more")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("decay_groups: argument 'model': no parameter requires a gradient")
    matrices = {"params": [(n, p) for n, p in named if _decays(n, p)], "weight_decay": weight_decay}
    rest = {"params": [(n, p) for n, p in named if not _decays(n, p)], "weight_decay": 0.0}
    return [group for group in (matrices, rest) if group["params"]]


def _decays(name: str, p: torch.Tensor) -> bool:
    return p.dim() >= 2 and name.rpartition(".")[2] != "bias"
