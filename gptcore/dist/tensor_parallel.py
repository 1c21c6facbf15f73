"""Matrices of a model cut over the ranks of a group, which compute each product together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as c10d

from gptcore.dist.group import Member, member_of
from gptcore.dist.same_module import agree_on_module
from gptcore.dist.shard import sharded_parameters
from gptcore.dist.tensor_shard import tensor_shards

DIMENSION = "tensor"


@dataclass(frozen=True)
class TensorSplit:
    """Over whom a model is cut; ``sequence_parallel``: each rank has some rows of what lies between cut layers."""

    member: Member
    sequence_parallel: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorSplit:
        return self  # a copied module is in the same process group


@runtime_checkable
class TensorModel(Protocol):
    """What cutting asks of a model."""

    def tensor_obstacle(self, ranks: int, sequence_parallel: bool) -> str | None:
        """Why it cannot be cut over so many ranks, as "got ..., expected ..."; None: it can."""

    def shard_tensors(self, split: TensorSplit) -> None:
        """Keep this rank's pieces alone, and reach the others' through the group from now on."""


_Module = TypeVar("_Module", bound=torch.nn.Module)


def tensor_parallel(
    module: _Module, mesh_or_group: Any = None, *, sequence_parallel: bool = False
) -> _Module:
    """Cut the matrices of a :class:`gptcore.models.GPT` over the ranks of a group, in place.

    Of P ranks each keeps H / P heads of every attention, F / P of every feed-forward's hidden units and V / P words of
    token embedding and head; norms, position embeddings, biases of the second products and layers of experts stay
    whole. The ranks work on the same batch: every one calls forward and backward with the same tokens and targets, in
    the same mode, and has the same losses and logits. F and V need not be multiples of P. Of key and value heads each
    rank has Hkv / P, or where Hkv < P one, which P / Hkv ranks share.

    Gradients are those of one process, whole after ``backward()``: a rank's slices have their own, and what all ranks
    have gets the same bits on all. Sums over ranks are made in rank order in f32. So the model is one with ordinary
    parameters, which a group of the ranks that have the same slices (other data, one rank of each tensor group) may
    average (:func:`average_gradients`), shard, or hand to ``DistributedDataParallel``. :func:`clip_gradients` and
    :func:`full_state_dict` know the slices.

    Random numbers come from each rank's own generator and must be the same on all ranks: seed them alike. Dropout of
    the stream then drops what one process drops; that on attention's probabilities, other places on each rank.

    Call it before the optimizer is made: the cut parameters are new ones. On the meta device nothing is allocated.

    Args:
        module: the same on all ranks, weights included.
        mesh_or_group: a ``torch.distributed`` process group, or a ``DeviceMesh`` with a dimension named "tensor"; None:
            all processes.
        sequence_parallel: norms, residual stream and dropout on N / P of the N tokens of a pass, any number of them.
            Saves memory of activations at the same traffic.

    Returns:
        ``module``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a group without this process, a mesh without that dimension; a module that cannot be cut over so
            many ranks, that is cut already, or differs over ranks. All ranks raise then.

    Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
    Parallelism", section 3; Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models", section 4.2.
    """
    member = member_of("tensor_parallel", group_of("tensor_parallel", mesh_or_group))
    obstacle = _obstacle(module, member, sequence_parallel)
    options = _Options(sequence_parallel, repr(getattr(module, "config", None)))
    agree_on_module("tensor_parallel", module, {"": options}, obstacle, member)
    assert isinstance(module, TensorModel)
    module.shard_tensors(TensorSplit(member, sequence_parallel))
    return module


def group_of(call: str, mesh_or_group: Any) -> Any:
    """The process group of a mesh's dimension "tensor"; a group, or None, as it is."""
    if not (c10d.is_available() and isinstance(mesh_or_group, c10d.DeviceMesh)):
        return mesh_or_group
    names = mesh_or_group.mesh_dim_names or ()
    if DIMENSION not in names:
        raise ValueError(
            f"{call}: argument 'mesh_or_group': got a mesh with dimensions {names}, expected one with '{DIMENSION}'"
        )
    return mesh_or_group.get_group(DIMENSION)


@dataclass
class _Options:
    """What must be equal on all ranks beside the module."""

    sequence_parallel: bool
    config: str


def _obstacle(module: torch.nn.Module, member: Member, sequence_parallel: bool) -> str | None:
    if not isinstance(module, TensorModel):
        return f"got {type(module).__name__}, expected a gptcore.models.GPT"
    if tensor_shards(module):
        return "got one that is cut already, expected whole matrices on every rank"
    own = set(c10d.get_process_group_ranks(member.group))
    for name, shard in sharded_parameters(module).items():
        if len(own & set(c10d.get_process_group_ranks(shard.member.group))) > 1:
            return f"got experts spread over ranks of the same group ('{name}'), expected one rank of each such group"
    return module.tensor_obstacle(member.ranks, sequence_parallel)
