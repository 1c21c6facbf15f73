"""Bytes of an optimizer's state by formula, from the shapes of the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from gptcore.models.accounting import Shape
from gptcore.train.optimizers import OptimizerSpec

# As gptcore/optim/adamw_8bit.py has them.
_QUANTISED_FROM = 4096
_SCALE_BLOCK = 256


class StateSize(NamedTuple):
    """Bytes of f32 masters (or what split ones keep of them), and of moments with scales and step counts."""

    masters: int
    moments: int

    @property
    def total(self) -> int:
        return sum(self)


def state_size(spec: OptimizerSpec, shapes: Mapping[Shape, int], element_bytes: int) -> StateSize:
    """Of the optimizer that ``spec`` describes, over ``shapes`` (how many tensors of each), after its first step.

    Args:
        element_bytes: of the parameters, 4 (f32, which have no masters) or 2 (bf16).
    """
    masters = moments = 0
    for shape, copies in shapes.items():
        masters += copies * (_master(spec, shape) if element_bytes == 2 else 0)
        moments += copies * _moments(spec, shape)
    return StateSize(masters, moments)


def _master(spec: OptimizerSpec, shape: Shape) -> int:
    n = math.prod(shape)
    if spec.name == "adamw_8bit" and spec.master_weights is False and n >= _QUANTISED_FROM:
        return 0
    return 2 * n if spec.split_master else 4 * n


def _moments(spec: OptimizerSpec, shape: Shape) -> int:
    n, step = math.prod(shape), 4  # a count in f32, of all but SGD
    if spec.name == "sgd":
        return 4 * n if spec.options().get("momentum") else 0
    if spec.name == "adafactor":
        return _adafactor(spec, shape) + step
    if spec.name == "adamw_8bit" and n >= _QUANTISED_FROM:
        return 2 * (n + 4 * -(-n // _SCALE_BLOCK)) + step
    return (12 if spec.amsgrad else 8) * n + step


def _adafactor(spec: OptimizerSpec, shape: Shape) -> int:
    """A row and a column of each matrix, or all of the second moment; with beta1 the first moment too."""
    n, palm = math.prod(shape), spec.variant == "palm"
    averaged = palm or spec.beta1 is not None
    second = n // shape[-1] + n // shape[-2] if len(shape) > 1 and not palm else n
    return 4 * (second + averaged * n)
