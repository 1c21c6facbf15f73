"""Optimizers over the fused kernels, parameter groups, and learning-rate schedules."""

from __future__ import annotations

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.optim import schedule
from gptcore.optim.adafactor import Adafactor
from gptcore.optim.adamw import Adam, AdamW
from gptcore.optim.adamw_8bit import AdamW8bit
from gptcore.optim.fsdp import FSDPOptimizer
from gptcore.optim.groups import decay_groups
from gptcore.optim.loss_scale import LossScaler
from gptcore.optim.sgd import SGD
from gptcore.optim.zero import ZeroOptimizer

__all__ = [
    "SGD", "Adafactor", "Adam", "AdamW", "AdamW8bit", "FSDPOptimizer", "LossScaler", "ZeroOptimizer", "decay_groups",
    "schedule",
]  # fmt: skip
