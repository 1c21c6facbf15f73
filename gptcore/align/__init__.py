"""Alignment: from a pretrained model to an assistant.

| module | what it holds |
|---|---|
| ``losses`` | every loss and advantage as a pure function |
| ``decision_process`` | the token-level Markov decision process and its exact solutions, the oracle of the rest |
| ``policy``, ``kept_logits``, ``sampled_entropy`` | responses in training, under the distribution sampled from |
| ``ppo`` | the loop of learning from rewards: PPO, PPO-ptx, GRPO, RLOO, REINFORCE |
| ``answers``, ``experience``, ``policy_update``, ``critic`` | its parts: prompts, rewards, data, updates |
| ``reinforcement_spec``, ``reinforcement_parts``, ``reinforcement_state`` | its settings, start and checkpoints |
| ``shares`` | how processes share it |
| ``supervised`` | fine-tuning on demonstrations |
| ``reward_model``, ``rankings`` | scores of answers, from pairs and rankings of K |
| ``preferences``, ``pairs`` | DPO and its family |
| ``comparisons`` | both as stages, from files and settings |
| ``verifier``, ``sandbox`` | rewards by running what a model wrote, where it can do no harm |

Nothing is imported before it is asked for: ``gptcore.align.losses`` loads that module and what it needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in __dir__():
        return importlib.import_module(f"gptcore.align.{name}")
    raise AttributeError(f"module 'gptcore.align' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
