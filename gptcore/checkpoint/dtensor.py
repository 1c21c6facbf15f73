"""Models sharded as DTensors (FSDP2, torch's tensor parallelism) into checkpoints and out of them, each rank its part.

A DTensor's local tensor is a box of the whole, which in row-major order is a few runs of elements; one, where it is
sharded along the first dimension, as ``fully_shard`` does it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gptcore.checkpoint.manifest import CheckpointError
from gptcore.checkpoint.reader import Checkpoint
from gptcore.checkpoint.shard import Owned, Slice
from gptcore.dist import Member


class _Runs(NamedTuple):
    """A local tensor's elements as runs of ``length``, the first of each counted flat in the whole."""

    starts: list[int]
    length: int


def slices_of(tensors: Mapping[str, Tensor], member: Member) -> dict[str, Owned]:
    """What this rank of ``member`` passes to :func:`gptcore.checkpoint.save` of ``tensors``, which all ranks have.

    Of a DTensor its slices, of replicas those at the mesh's first place. Other tensors are taken from rank 0.

    Raises:
        ValueError: a DTensor with a placement other than ``Shard`` and ``Replicate``.
    """
    own: dict[str, Owned] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if member.rank == 0:
                own[name] = tensor
            continue
        runs = _runs("slices_of", name, tensor)
        if _is_first_replica(tensor):
            flat = tensor.to_local().detach().reshape(-1)
            parts = flat.split(runs.length) if runs.starts else ()
            slices = [
                Slice(part, start, tensor.shape) for start, part in zip(runs.starts, parts, strict=True)
            ]
            own[name] = slices or Slice(flat, 0, tensor.shape)
    return own


def read_into(opened: Checkpoint, tensors: Mapping[str, Tensor], *, verify: bool = True) -> None:
    """Fill ``tensors`` with those of their names in the checkpoint, of a DTensor only what this rank has.

    Args:
        opened: by whatever number of ranks it was written.
        tensors: any device and strides; their values are replaced.
        verify: compare the digests of all pieces that hold something of it.

    Raises:
        CheckpointError: a damaged checkpoint; a tensor that it lacks or has in another shape or dtype, which is found
            before anything is written.
        ValueError: as :func:`slices_of`.
    """
    for name, tensor in tensors.items():
        _check_same(opened, name, tensor)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not isinstance(tensor, DTensor):
                tensor.copy_(opened.read(name, verify=verify))
                continue
            runs, local = _runs("read_into", name, tensor), tensor.to_local()
            parts = [opened.read(name, start, start + runs.length, verify=verify) for start in runs.starts]
            if parts:
                local.copy_(torch.cat(parts).view(local.shape))


def _check_same(opened: Checkpoint, name: str, tensor: Tensor) -> None:
    if name not in opened.manifest.tensors:
        raise CheckpointError(f"checkpoint {opened.path} has no tensor '{name}'")
    dtype, shape = opened.dtype(name), opened.shape(name)
    if (dtype, shape) != (tensor.dtype, tuple(tensor.shape)):
        raise CheckpointError(
            f"checkpoint {opened.path}: '{name}' is {dtype} {shape}, expected {tensor.dtype} {tuple(tensor.shape)}"
        )


def _is_first_replica(tensor: DTensor) -> bool:
    place = tensor.device_mesh.get_coordinate()
    return place is not None and not any(
        at for at, placement in zip(place, tensor.placements, strict=True) if isinstance(placement, Replicate)
    )


def _runs(call: str, name: str, tensor: DTensor) -> _Runs:
    for placement in tensor.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"checkpoint.{call}: '{name}': got placement {placement}, expected Shard or Replicate"
            )
    box, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in box or tensor.device_mesh.get_coordinate() is None:
        return _Runs([], 0)
    return _Runs(
        list(_starts(tuple(tensor.shape), tuple(box), tuple(first))), _length(tuple(tensor.shape), tuple(box))
    )


def _inner(shape: tuple[int, ...], box: tuple[int, ...]) -> int:
    """The dimension along which one run goes: all behind it are whole."""
    dim = len(shape)
    while dim > 0 and box[dim - 1] == shape[dim - 1]:
        dim -= 1
    return max(dim - 1, 0)


def _length(shape: tuple[int, ...], box: tuple[int, ...]) -> int:
    return math.prod(box[_inner(shape, box) :])


def _starts(shape: tuple[int, ...], box: tuple[int, ...], first: tuple[int, ...]) -> Iterator[int]:
    inner = _inner(shape, box)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    origin = sum(at * stride for at, stride in zip(first, strides, strict=True))
    for place in itertools.product(*(range(count) for count in box[:inner])):
        yield origin + sum(at * stride for at, stride in zip(place, strides, strict=False))
