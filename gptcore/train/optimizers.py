"""The optimizer that a config names, over a model's parameters."""

from __future__ import annotations

import torch

from gptcore.optim import AdamW, decay_groups
from gptcore.optim.fused import FusedOptimizer
from gptcore.train.config import OptimizerSpec


def build(spec: OptimizerSpec, model: torch.nn.Module) -> FusedOptimizer:
    """An optimizer over all parameters of ``model``, in groups with and without weight decay."""
    return AdamW(
        decay_groups(model, spec.weight_decay),
        lr=spec.lr,
        betas=(spec.betas[0], spec.betas[1]),
        eps=spec.eps,
        max_norm=spec.max_norm or None,
        split_master=spec.split_master,
    )
