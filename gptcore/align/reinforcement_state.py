"""What a checkpoint of a run of reinforcement learning holds: put away whole, taken up to the bit.

The actor's weights stand where every run has its model's, so ``gptcore generate`` and the next stage take the run as
they take any other; the critic, its optimizer and the averaged weights stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptcore import checkpoint
from gptcore.align.policy_update import Learner
from gptcore.checkpoint.shard import Owned
from gptcore.optim import ZeroOptimizer
from gptcore.train import sharding, state

_CRITIC, _AVERAGE = "critic/", "average/"


def collect(learner: Learner) -> tuple[dict[str, Owned], dict[str, Any]]:
    """Tensors of a learner that this process has to save, and JSON state."""
    tensors, values = _of(learner, learner.actor, learner.optimizer)
    if learner.critic is not None and learner.critic_optimizer is not None:
        own, values["critic"] = _of(learner, learner.critic, learner.critic_optimizer)
        tensors |= {_CRITIC + name: tensor for name, tensor in own.items()}
    if learner.shares.first:
        tensors |= state.generators()
        if learner.average is not None:
            tensors |= {_AVERAGE + name: tensor for name, tensor in learner.average.weights.items()}
    return tensors, {**values, "updates": learner.updates}


def _of(
    learner: Learner, model: torch.nn.Module, optimizer: sharding.Optimizer
) -> tuple[dict[str, Owned], dict[str, Any]]:
    """Of one model and its optimizer, without generators: slices, or from one process everything."""
    if isinstance(optimizer, ZeroOptimizer):
        slices, whole, values = sharding.collect(model, optimizer)
        return {**slices, **(whole if learner.shares.first else {})}, values
    tensors, values = state.collect(model, optimizer)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(state.RNG_PREFIX)}
    return dict(own) if learner.shares.first else {}, values


def restore(learner: Learner, opened: checkpoint.Checkpoint) -> None:
    """Put back what :func:`collect` returned, of any number of processes. Raises CheckpointError where models or
    settings are others."""
    values = opened.state
    _put(learner.actor, learner.optimizer, _Part(opened, "", values))
    if (learner.critic is None) != ("critic" not in values):
        raise checkpoint.CheckpointError(
            "the checkpoint and the settings differ in whether there is a critic"
        )
    if learner.critic is not None and learner.critic_optimizer is not None:
        _put(learner.critic, learner.critic_optimizer, _Part(opened, _CRITIC, values["critic"]))
    if learner.average is not None:
        for name, weight in learner.average.weights.items():
            if _AVERAGE + name not in opened.names:
                raise checkpoint.CheckpointError(
                    f"the checkpoint has no average of the weights: '{name}' is missing"
                )
            weight.copy_(opened.read(_AVERAGE + name))
    learner.updates = values["updates"]


@dataclass(frozen=True)
class _Part:
    """The tensors of a checkpoint under ``prefix``, as a checkpoint of their own with ``state``."""

    opened: checkpoint.Checkpoint
    prefix: str
    state: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        return [name[len(self.prefix) :] for name in self.opened.names if name.startswith(self.prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.opened.shape(self.prefix + name)

    def dtype(self, name: str) -> torch.dtype:
        return self.opened.dtype(self.prefix + name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        return self.opened.read(self.prefix + name, start, stop)

    def generators(self) -> dict[str, torch.Tensor]:
        return {
            name: self.opened.read(name) for name in self.opened.names if name.startswith(state.RNG_PREFIX)
        }


def _put(model: torch.nn.Module, optimizer: sharding.Optimizer, part: _Part) -> None:
    if isinstance(optimizer, ZeroOptimizer):
        sharding.restore(model, optimizer, part)
    else:
        tensors = {name: part.read(name) for name in part.names}
        state.restore(model, optimizer, {**tensors, **part.generators()}, part.state)


def save_average(learner: Learner, directory: Path, step: int, identity: Mapping[str, Any]) -> None:
    """The averaged weights as a run of their own, which ``gptcore generate`` takes."""
    assert learner.average is not None
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    held = state.stored(learner.actor)
    for name, tensor in learner.actor.state_dict(keep_vars=True).items():
        if name in held and first.setdefault(id(tensor), name) == name:
            tensors[held[name]] = learner.average.weights.get(name, tensor).detach().to(tensor.dtype)
        elif name in held:
            tied[name] = first[id(tensor)]
    checkpoint.save(directory / "checkpoints", step, tensors, {**identity, "tied": tied}, keep_last=1)
