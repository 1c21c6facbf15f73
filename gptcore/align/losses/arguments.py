"""What every loss asks of its arguments, checked once and named in the error."""

from __future__ import annotations

import torch

from gptcore.errors import UserError


def same_shape(function: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors have the first one's shape.

    Raises:
        ValueError: naming the function, the argument, what came and what was expected.
    """
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(there))
    expected = tuple(there[first].shape)
    for name, tensor in there.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, {first} has {expected}")


def check_mask(function: str, mask: torch.Tensor, name: str = "mask") -> None:
    """``mask`` holds booleans: a float mask with weights in it would silently count as something else."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: {name} has dtype {mask.dtype}, expected torch.bool")


def check_finite(function: str, name: str, values: torch.Tensor) -> None:
    """No NaN and no infinity: one of them would spread over the whole batch through a mean.

    Raises:
        UserError: naming the first place.
    """
    finite = values.isfinite()
    if not bool(finite.all()):
        place = tuple(int(i) for i in (~finite).nonzero()[0])
        raise UserError(f"{function}: {name}{list(place)} is {float(values[place])}, expected finite numbers")


def check_range(
    function: str, name: str, value: float, low: float, high: float, *, above: bool = False
) -> None:
    """``low <= value <= high``; with ``above`` strictly more than ``low``."""
    if not (low < value if above else low <= value) or not value <= high:
        opening = "(" if above else "["
        raise ValueError(f"{function}: {name} is {value}, expected one in {opening}{low:g}, {high:g}]")


def computed(tensor: torch.Tensor) -> torch.Tensor:
    """In f32 at least: sums of log-probabilities in bf16 keep two or three digits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
