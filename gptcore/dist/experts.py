"""Layers of experts over the ranks of a group: each keeps its share of the experts."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from gptcore.dist.group import member_of
from gptcore.dist.same_module import agree_on_module
from gptcore.dist.shard import Shard, sharded_parameters


@runtime_checkable
class ExpertLayer(Protocol):
    """What spreading asks of a layer."""

    num_experts: int

    def shard_experts(self, shard: Shard) -> None:
        """Keep the experts of ``shard`` alone, and reach the others through its group from now on."""


_Module = TypeVar("_Module", bound=torch.nn.Module)


def expert_parallel(module: _Module, group: Any = None) -> _Module:
    """Spread the experts of every :class:`gptcore.nn.MoE` in ``module`` over the ranks of ``group``, in place.

    Each rank keeps E / P of the E experts (the first E mod P ranks one more) and all other weights. A forward call is
    one of all ranks, each with tokens of its own, any number of them; the results are one process's on the ranks'
    batches one after the other in rank order: the same choices, places and drops, capacities and losses being counted
    over all ranks, and rows of experts with the same bits. So every rank calls forward and backward equally often, in
    the same mode and with the same options.

    Gradients are those of the sum over ranks of the ranks' losses for whatever a rank feeds in and for weights that
    all ranks have, as is usual before averaging: :func:`average_gradients` or ``DistributedDataParallel`` average
    them. Those of the experts are already over P, the mean over ranks, and neither touches them: torch's wrapper is
    told to ignore them, where it is handed ``module`` itself. With a mean over equally many tokens on each rank
    as the loss, all are one process's; for uneven batches scale each rank's loss by its share of the tokens times P.

    Random numbers of the choice (``priority="random"``, ``second_choice``, ``noise``) are drawn for all tokens on every
    rank, and rank 0's count: they are those of one process whose generator stands where rank 0's does. Jitter and
    dropout come from each rank's own generator: seed ranks differently, or tokens of different ranks get the same
    numbers.

    Call it before the optimizer is made: the experts' parameters are new ones. On the meta device nothing is
    allocated, so a model may be built there, spread, and then filled (``load_full_state_dict``).

    Args:
        module: the same on all ranks, weights included.
        group: a ``torch.distributed`` process group; None: all processes.

    Returns:
        ``module``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a group without this process; a module without layers of experts, with fewer experts than ranks,
            spread already, or different over ranks. All ranks raise then.
    """
    member = member_of("expert_parallel", group)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, ExpertLayer)}
    agree_on_module("expert_parallel", module, layers, _obstacle(module, layers, member.ranks), member)
    for layer in layers.values():
        layer.shard_experts(Shard.of(layer.num_experts, member))
    wrapper = torch.nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(module, [*sharded_parameters(module)])
    return module


def _obstacle(module: torch.nn.Module, layers: dict[str, Any], ranks: int) -> str | None:
    if not layers:
        return f"got {type(module).__name__} without a layer of experts, expected one with gptcore.nn.MoE"
    if sharded_parameters(module):
        return "got experts that are spread already, expected all of them on every rank"
    for name, layer in layers.items():
        if layer.num_experts < ranks:
            where = f" in '{name}'" if name else ""
            return f"got {layer.num_experts} experts{where}, expected at least one for each of {ranks} ranks"
    return None
