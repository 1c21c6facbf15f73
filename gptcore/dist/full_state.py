"""Whole state from slices: a checkpoint knows nothing of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gptcore.dist.collectives import gather_rows
from gptcore.dist.shard import sharded_parameters
from gptcore.dist.tensor_shard import tensor_shards


def full_state_dict(module: torch.nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with whole tensors, as the model had it in one process; every rank gets all of it.

    Every rank of the groups over which it is spread or cut calls it.
    """
    state = dict(module.state_dict())
    with torch.no_grad():
        for name, shard in sharded_parameters(module).items():
            state[name] = gather_rows(state[name], shard.sizes, shard.member)
        for name, cut in tensor_shards(module).items():
            state[name] = cut.gather(state[name])
    return state


def load_full_state_dict(
    module: torch.nn.Module, state: Mapping[str, Tensor], *, strict: bool = True
) -> None:
    """Load what :func:`full_state_dict` gave, or a model in one process, each rank its slices.

    Raises:
        ValueError: a tensor that is not as long as the whole in the dimension of its slices; nothing is loaded then.
        RuntimeError: as ``load_state_dict`` has it.
    """
    own = dict(state)
    for name, shard in sharded_parameters(module).items():
        if name in own:
            _check_length(name, own[name], 0, shard.total)
            own[name] = own[name][shard.start : shard.stop]
    for name, cut in tensor_shards(module).items():
        if name in own:
            _check_length(name, own[name], cut.dim, cut.total)
            own[name] = cut.take(own[name])
    module.load_state_dict(own, strict=strict)


def _check_length(name: str, tensor: Tensor, dim: int, total: int) -> None:
    if tensor.dim() <= dim or tensor.shape[dim] != total:
        where = ("first", "second")[dim]
        raise ValueError(
            f"load_full_state_dict: '{name}': got shape {tuple(tensor.shape)}, expected the whole of "
            f"{total} along the {where} dimension"
        )
