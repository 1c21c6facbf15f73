"""What a rank has of the weights and optimizer states of a run, by name, and taking it back from whole tensors.

Names are ``<parameter>`` for weights and ``<parameter>/<key>`` for states, as one process would have them; a slice says
where in the whole, flattened, it belongs. So what is saved knows nothing of ranks or stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from gptcore.optim.fsdp import FSDPOptimizer
from gptcore.optim.zero import Owned, ZeroOptimizer

Divided = ZeroOptimizer | FSDPOptimizer  # among ranks, each with slices of parameters


class Part(NamedTuple):
    """Elements from ``start`` on, flattened, of a tensor of ``shape``."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]


Parts = dict[str, list[Part]]


def weights(optimizer: Divided) -> Parts:
    """This rank's share of the trained parameters; each element is one rank's."""
    return {
        owned.name: [Part(owned.weights, owned.start, tuple(owned.parameter.shape))]
        for owned in optimizer.owned()
    }


def states(optimizer: Divided) -> Parts:
    """This rank's share of the states."""
    parts: Parts = {}
    saved = optimizer.optimizer.state_dict()
    index = _indices(optimizer)
    for owned in optimizer.owned():
        for key, value in saved["state"].get(index[owned.part], {}).items():
            if owned.start == 0 or not (value.dim() == 0 or key == "col_var"):
                parts[f"{owned.name}/{key}"] = [_part(key, value, owned)]
    return parts


def restore(
    optimizer: Divided,
    keys: Callable[[str], Iterable[str]],
    read: Callable[[str, int, int], Tensor],
) -> None:
    """Give the wrapped optimizer this rank's slices of states that were saved by any number of ranks at any stage.

    Args:
        keys: by parameter's name the keys that it has states of.
        read: elements of a state by ``(<parameter>/<key>, start, stop)``, (stop - start,).
    """
    index = _indices(optimizer)
    found: dict[int, dict[str, Any]] = {}
    for owned in optimizer.owned(whole_parts=True):
        values: dict[str, Tensor] = {}
        for key in keys(owned.name):
            start, stop = _extent(key, owned)
            value = read(f"{owned.name}/{key}", start, stop)
            values[key] = value.reshape(_shape_here(key, owned))
        if values:
            found[index[owned.part]] = values
    groups = optimizer.optimizer.state_dict()["param_groups"]
    optimizer.optimizer.load_state_dict({"state": found, "param_groups": groups})


def _indices(optimizer: Divided) -> dict[Tensor, int]:
    """The numbers by which the wrapped optimizer's ``state_dict`` calls its parameters."""
    parts = (p for group in optimizer.optimizer.param_groups for p in group["params"])
    return {p: i for i, p in enumerate(parts)}


def _part(key: str, value: Tensor, owned: Owned) -> Part:
    start, stop = _extent(key, owned)
    if value.dim() == 0:
        return Part(value.reshape(1), 0, ())
    first, _ = _extent(key, owned._replace(start=owned.part_start))
    flat = value.reshape(-1)[start - first : stop - first]
    return Part(flat, start, _whole_shape(key, owned))


def _extent(key: str, owned: Owned) -> tuple[int, int]:
    """From where to where a state of the elements ``owned.start`` to ``owned.stop - 1`` goes in the whole."""
    if key == "step":
        return 0, 1
    if key.endswith("_scale"):
        return owned.start // _SCALED, -(-owned.stop // _SCALED)
    columns = owned.parameter.shape[-1] if owned.parameter.dim() else 1
    if key == "row_var":
        return owned.start // columns, owned.stop // columns
    if key == "col_var":  # all of it with every owner
        return 0, math.prod(_whole_shape(key, owned))
    return owned.start, owned.stop


def _shape_here(key: str, owned: Owned) -> tuple[int, ...]:
    """In which the optimizer keeps what it has of a state."""
    if key == "row_var":
        return (-1, 1)
    return () if key == "step" else _whole_shape(key, owned) if key == "col_var" else (-1,)


def _whole_shape(key: str, owned: Owned) -> tuple[int, ...]:
    shape = tuple(owned.parameter.shape)
    if key == "row_var":
        return (*shape[:-1], 1)
    if key == "col_var":
        return (*shape[:-2], 1, shape[-1])
    return (-(-owned.parameter.numel() // _SCALED),) if key.endswith("_scale") else shape


_SCALED = 256  # elements of 8-bit moments that share a scale
