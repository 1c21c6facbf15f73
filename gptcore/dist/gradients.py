"""Gradients over the ranks of a group, for loops without torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore import ops
from gptcore.dist.group import Member, member_of
from gptcore.dist.shard import sharded_parameters

# One message holds so many f32 elements (32 MiB): enough that latency does not count, little beside a model.
_BUCKET = 8 << 20


def average_gradients(module: torch.nn.Module, group: Any = None) -> None:
    """Replace the gradients of parameters that all ranks have by their means over ranks, summed in f32.

    A rank without a gradient of a parameter counts as zero; where no rank has one, none is made. Gradients of experts
    spread by :func:`expert_parallel` are means already and stay. Every rank calls it, after backward.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a group without this process, or other than that of the experts.
    """
    member = member_of("average_gradients", group)
    if member.ranks == 1:
        return
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
    leave it None and call this after :func:`average_gradients`. Every rank calls it.

    Returns:
        The norm before, the same on all ranks; where it is not finite gradients are as they were, and no rank should
        take the step.

    Raises:
        RuntimeError, ValueError: as :func:`average_gradients`; a ``max_norm`` that is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_gradients: argument 'max_norm': got {max_norm}, expected a number above 0")
    member = member_of("clip_gradients", group)
    replicated = [p.grad for p in _replicated(module, member, "clip_gradients") if p.grad is not None]
    named = dict(module.named_parameters())
    spread = [named[name].grad for name in sharded_parameters(module)]
    own = [gradient for gradient in spread if gradient is not None]
    squares = torch.tensor(_norm(own) ** 2, dtype=torch.float64)
    c10d.all_reduce(squares, group=member.group)
    norm = (_norm(replicated) ** 2 + float(squares)) ** 0.5
    if max_norm < norm < float("inf"):
        torch._foreach_mul_([*replicated, *own], max_norm / (norm + 1e-6))
    return norm


def _norm(gradients: list[Tensor]) -> float:
    return ops.grad_norm(gradients)[0] if gradients else 0.0


def _replicated(module: torch.nn.Module, member: Member, call: str) -> list[torch.nn.Parameter]:
    """The parameters that every rank has, in the module's order."""
    shards = sharded_parameters(module)
    for name, shard in shards.items():
        if shard.member.group is not member.group:
            raise ValueError(f"{call}: argument 'group': got another group than that of '{name}'")
    return [p for name, p in module.named_parameters() if name not in shards]


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
