"""Whether the ranks of a group begin with the same module."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.dist.group import Member, refuse_difference


def agree_on_module(
    call: str, module: torch.nn.Module, layers: Mapping[str, Any], obstacle: str | None, member: Member
) -> None:
    """Raise on all ranks where one of them cannot go on, having an ``obstacle``, or has another module.

    layers: those whose options must be equal, by name; so must shapes and contents of all parameters.
    """
    facts = _description(module, layers) if obstacle is None else {}
    everyone: list[Any] = [None] * member.ranks
    c10d.all_gather_object(everyone, (obstacle, facts), group=member.group)
    for rank, (other, _) in enumerate(everyone):
        if other is not None:
            raise ValueError(f"{call}: argument 'module': {other} (rank {rank})")
    refuse_difference(f"{call}: argument 'module'", [facts for _, facts in everyone])


def _description(module: torch.nn.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Plain facts by name that must be equal: options of the layers, shapes and contents of the parameters."""
    facts: dict[str, Any] = {}
    for name, layer in layers.items():
        for key, value in vars(layer).items():
            if not key.startswith("_") and isinstance(value, (bool, int, float, str, dict)):
                facts[f"{name}.{key}".lstrip(".")] = value
    for name, parameter in module.named_parameters():
        kind = f"{parameter.dtype} on {parameter.device.type}"
        facts[name] = f"{tuple(parameter.shape)}, {kind}, requires_grad {parameter.requires_grad}"
    for name, parameter in module.named_parameters():
        facts[f"contents of {name} (CRC-32)"] = checksum(parameter)
    return facts


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the contents; 0 on the meta device."""
    if tensor.device.type == "meta":
        return 0
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)
