"""Gradients over the ranks of a group, for loops without torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore import ops
from gptcore.dist.group import Member, member_of
from gptcore.dist.shard import sharded_parameters
from gptcore.dist.tensor_shard import tensor_shards

# One message holds so many f32 elements (32 MiB): enough that latency does not count, little beside a model.
_BUCKET = 8 << 20


def average_gradients(module: torch.nn.Module, group: Any = None) -> None:
    """Replace the gradients of parameters that all ranks have by their means over ranks, summed in f32.

    A rank without a gradient of a parameter counts as zero; where no rank has one, none is made. Gradients of experts
    spread by :func:`expert_parallel` are means already and stay. Of a model cut by :func:`tensor_parallel`, ``group``
    is one of ranks with the same slices and other data. Every rank calls it, after backward.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a group without this process, other than that of the experts, or of ranks with different slices.
    """
    member = member_of("average_gradients", group)
    if member.ranks == 1:
        return
    _refuse_slices(module, member)
    parameters = [p for p in _replicated(module, member, "average_gradients") if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    if len(parameters):
        c10d.all_reduce(present, op=c10d.ReduceOp.MAX, group=member.group)
    wanted = [p for p, somewhere in zip(parameters, present.tolist(), strict=True) if somewhere]
    for bucket in _buckets(wanted):
        _average(bucket, member)


def clip_gradients(module: torch.nn.Module, max_norm: float, group: Any = None) -> float:
    """Scale all gradients so that the norm of one process's whole gradient is at most ``max_norm``.

    An optimizer's own ``max_norm`` sees the experts of one rank alone, and ranks would scale by different factors:
    leave it None and call this after :func:`average_gradients`. Slices made by :func:`tensor_parallel` are counted
    over the ranks that have them, whatever ``group`` is. Every rank calls it.

    Returns:
        The norm before, the same on all ranks; where it is not finite gradients are as they were, and no rank should
        take the step.

    Raises:
        RuntimeError, ValueError: as :func:`average_gradients`; a ``max_norm`` that is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_gradients: argument 'max_norm': got {max_norm}, expected a number above 0")
    member = member_of("clip_gradients", group)
    cut, experts = tensor_shards(module), sharded_parameters(module)
    replicated = [p.grad for p in _replicated(module, member, "clip_gradients", cut) if p.grad is not None]
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    spread = [named[name] for name in experts if name in named]
    squares = _norm(replicated) ** 2
    if experts:
        squares += _over_ranks(spread, member.group)
    if cut:
        parts = [part for name in cut if name in named for part in cut[name].counted_here(named[name])]
        squares += _over_ranks(parts, next(iter(cut.values())).member.group)
    norm = squares**0.5
    if max_norm < norm < float("inf"):
        torch._foreach_mul_([*named.values()], max_norm / (norm + 1e-6))
    return norm


def _over_ranks(gradients: list[Tensor], group: Any) -> float:
    """The sum of squares of all ranks' gradients."""
    squares = torch.tensor(_norm(gradients) ** 2, dtype=torch.float64)
    c10d.all_reduce(squares, group=group)
    return float(squares)


def _norm(gradients: list[Tensor]) -> float:
    return ops.grad_norm(gradients)[0] if gradients else 0.0


def _refuse_slices(module: torch.nn.Module, member: Member) -> None:
    """Ranks that have different slices have no mean of them."""
    ranks = set(c10d.get_process_group_ranks(member.group))
    for name, shard in tensor_shards(module).items():
        if len(ranks & set(c10d.get_process_group_ranks(shard.member.group))) > 1:
            raise ValueError(
                f"average_gradients: argument 'group': got one with several ranks among which '{name}' is cut, "
                "expected one of ranks that have the same slices"
            )


def _replicated(
    module: torch.nn.Module, member: Member, call: str, besides: Container[str] = ()
) -> list[torch.nn.Parameter]:
    """The parameters that every rank has, in the module's order; not those named in ``besides``."""
    shards = sharded_parameters(module)
    for name, shard in shards.items():
        if shard.member.group is not member.group:
            raise ValueError(f"{call}: argument 'group': got another group than that of '{name}'")
    return [p for name, p in module.named_parameters() if name not in shards and name not in besides]


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        if bucket and filled + parameter.numel() > _BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.numel()
    if bucket:
        yield bucket


def _average(bucket: list[torch.nn.Parameter], member: Member) -> None:
    dtype = torch.promote_types(bucket[0].dtype, torch.float32)
    flat = torch.cat([_gradient(p).reshape(-1).to(dtype) for p in bucket])
    c10d.all_reduce(flat, group=member.group)
    flat /= member.ranks
    for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(mean.view(parameter.shape))


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
