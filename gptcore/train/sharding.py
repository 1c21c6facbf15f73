"""A run over several ranks: its optimizer, what each rank puts into a checkpoint, and takes from one that any number of
ranks wrote at any stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gptcore.checkpoint import MODEL_PREFIX, Slice
from gptcore.optim import ZeroOptimizer, zero_state
from gptcore.optim.divided import Divided
from gptcore.optim.fused import FusedOptimizer
from gptcore.train import processes
from gptcore.train.config import TrainConfig
from gptcore.train.state import ADAPTER_PREFIX, OPTIMIZER_PREFIX, refuse_other_model, stored

Optimizer = FusedOptimizer | Divided


class Opened(Protocol):
    """What is read of a checkpoint; :class:`gptcore.checkpoint.Checkpoint` is one."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def state(self) -> Mapping[str, Any]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor: ...


def sharded(config: TrainConfig, optimizer: FusedOptimizer, model: torch.nn.Module) -> Optimizer:
    """``optimizer``, or around it one for several processes, leaves to add in a fixed order, or states to divide."""
    spec, data = config.parallel, config.data
    alone = processes.member().ranks == 1 and not spec.zero
    adds = spec.in_fixed_tree and data.batch * data.accumulate > config.grain
    if alone and not adds:
        return optimizer
    return ZeroOptimizer(optimizer, stage=spec.zero, module=model, fixed_tree=spec.in_fixed_tree)


def collect(
    model: torch.nn.Module, optimizer: Divided
) -> tuple[dict[str, list[Slice]], dict[str, Tensor], dict[str, Any]]:
    """This rank's slices; what one rank saves for all; JSON state."""
    states = zero_state.states(optimizer)
    held = stored(model)
    slices = {held[name]: parts for name, parts in zero_state.weights(optimizer).items()}
    slices |= {OPTIMIZER_PREFIX + name: parts for name, parts in states.items()}
    trained = optimizer.trained()
    whole: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in held:
            continue
        if id(tensor) in seen:
            tied[name] = seen[id(tensor)]
            continue
        seen[id(tensor)] = name
        if tensor not in trained:
            whole[held[name]] = tensor.detach()
    owned = {name: [Slice(*part) for part in parts] for name, parts in slices.items()}
    return owned, whole, {"tied": tied, "optimizer": {}}


def restore(model: torch.nn.Module, optimizer: Divided, opened: Opened) -> None:
    """Read this rank's part; every rank calls it.

    Raises:
        CheckpointError: the checkpoint is of another model; names the first difference.
    """
    held = stored(model)
    there = {
        name.partition("/")[2]: name
        for name in opened.names
        if name.startswith((MODEL_PREFIX, ADAPTER_PREFIX))
    }
    kinds = {name: (opened.shape(full), opened.dtype(full)) for name, full in there.items()}
    kinds |= {alias: kinds[name] for alias, name in opened.state["tied"].items()}
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in held}
    refuse_other_model(kinds, own)
    trained = optimizer.trained()
    with torch.no_grad():
        for owned in optimizer.owned(whole_parts=True):
            owned.weights.copy_(opened.read(there[owned.name], owned.start, owned.stop))
        for name, tensor in own.items():
            if name in there and tensor not in trained:
                tensor.copy_(opened.read(there[name]))
    optimizer.weights_changed()
    _restore_optimizer(optimizer, opened)


def _restore_optimizer(optimizer: Divided, opened: Opened) -> None:
    keys: dict[str, list[str]] = {}
    for full in opened.names:
        if full.startswith(OPTIMIZER_PREFIX):
            name, _, key = full[len(OPTIMIZER_PREFIX) :].rpartition("/")
            keys.setdefault(name, []).append(key)
    zero_state.restore(
        optimizer,
        lambda name: keys.get(name, ()),
        lambda name, start, stop: opened.read(OPTIMIZER_PREFIX + name, start, stop),
    )
