"""Training: the loop, its settings, its measurements. See docs/training.md."""

from __future__ import annotations

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.train.config import TrainConfig, from_table, load
from gptcore.train.evaluation import held_out
from gptcore.train.loop import Result, run
from gptcore.train.recovery import SpikeError
from gptcore.train.step import NonFiniteError, update

__all__ = [
    "NonFiniteError",
    "Result",
    "SpikeError",
    "TrainConfig",
    "from_table",
    "held_out",
    "load",
    "run",
    "update",
]
