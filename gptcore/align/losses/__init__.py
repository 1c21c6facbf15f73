"""Losses and advantages of alignment: pure functions on tensors, each with its shapes and its source.

| module | what it holds |
|---|---|
| ``kl`` | k1, k2, k3, the exact divergence, the adaptive coefficient |
| ``distribution`` | log-probabilities of the distribution sampled from, entropy |
| ``advantages`` | token rewards, discounting, GAE, whitening, RLOO and GRPO baselines |
| ``policy_gradient`` | REINFORCE, the surrogate, PPO, GRPO |
| ``values`` | the critic's clipped loss |
| ``preference`` | DPO (and conservative DPO), IPO, KTO, ORPO, SimPO |
| ``reward`` | pairs and rankings of K |
| ``supervised`` | negative log-likelihood, PPO-ptx |
| ``aggregation`` | from tokens to one loss, the same for every split into micro-batches |
| ``layout`` | padded rows and packed sequences |
"""

from __future__ import annotations

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.align.losses import (
    advantages,
    aggregation,
    distribution,
    kl,
    layout,
    policy_gradient,
    preference,
    reward,
    supervised,
    values,
)

__all__ = [
    "advantages", "aggregation", "distribution", "kl", "layout", "policy_gradient", "preference", "reward",
    "supervised", "values",
]  # fmt: skip
