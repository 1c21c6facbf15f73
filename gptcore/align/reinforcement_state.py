"""What a checkpoint of a run of reinforcement learning holds: put away whole, taken up to the bit.

The actor's weights stand where every run has its model's, so ``gptcore generate`` and the next stage take the run as
they take any other; the critic, its optimizer and the averaged weights stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptcore import checkpoint
from gptcore.align.policy_update import Learner
from gptcore.train import state

_CRITIC, _AVERAGE = "critic/", "average/"


def collect(learner: Learner) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON state of a learner."""
    tensors, values = state.collect(learner.actor, learner.optimizer)
    if learner.critic is not None and learner.critic_optimizer is not None:
        own, values["critic"] = state.collect(learner.critic, learner.critic_optimizer)
        tensors |= {
            _CRITIC + name: tensor for name, tensor in own.items() if not name.startswith(state.RNG_PREFIX)
        }
    if learner.average is not None:
        tensors |= {_AVERAGE + name: tensor for name, tensor in learner.average.weights.items()}
    return tensors, {**values, "updates": learner.updates}


def restore(learner: Learner, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Put back what :func:`collect` returned. Raises CheckpointError where models or settings are others."""
    state.restore(learner.actor, learner.optimizer, tensors, values)
    if (learner.critic is None) != ("critic" not in values):
        raise checkpoint.CheckpointError(
            "the checkpoint and the settings differ in whether there is a critic"
        )
    if learner.critic is not None and learner.critic_optimizer is not None:
        own = {name[len(_CRITIC) :]: tensor for name, tensor in tensors.items() if name.startswith(_CRITIC)}
        generator = {name: tensor for name, tensor in tensors.items() if name.startswith(state.RNG_PREFIX)}
        state.restore(learner.critic, learner.critic_optimizer, {**own, **generator}, values["critic"])
    if learner.average is not None:
        for name, weight in learner.average.weights.items():
            if _AVERAGE + name not in tensors:
                raise checkpoint.CheckpointError(
                    f"the checkpoint has no average of the weights: '{name}' is missing"
                )
            weight.copy_(tensors[_AVERAGE + name])
    learner.updates = values["updates"]


def save_average(learner: Learner, directory: Path, step: int, identity: Mapping[str, Any]) -> None:
    """The averaged weights as a run of their own, which ``gptcore generate`` takes."""
    assert learner.average is not None
    tensors, values = state.collect(learner.actor, learner.optimizer)
    for name, weight in learner.average.weights.items():
        tensors[checkpoint.MODEL_PREFIX + name] = weight.to(tensors[checkpoint.MODEL_PREFIX + name].dtype)
    only = {name: tensor for name, tensor in tensors.items() if name.startswith(checkpoint.MODEL_PREFIX)}
    checkpoint.save(directory / "checkpoints", step, only, {**identity, "tied": values["tied"]}, keep_last=1)
