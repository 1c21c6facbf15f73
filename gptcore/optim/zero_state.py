"""What a rank has of the weights and optimizer states of a run, by name, and taking it back from whole tensors.

Names are ``<parameter>`` for weights and ``<parameter>/<key>`` for states, as one process would have them; a slice says
where in the whole, flattened, it belongs. So what is saved knows nothing of ranks or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gptcore.optim.fused import FusedOptimizer
from gptcore.optim.slices import StatePlace
from gptcore.optim.zero_layout import Owned


class Sliced(Protocol):
    """An optimizer among ranks, around one of ours that has slices of parameters."""

    optimizer: FusedOptimizer

    def owned(self, *, whole_parts: bool = False) -> Iterator[Owned]:
        """What this rank answers for, or what its optimizer works on."""


class Part(NamedTuple):
    """Elements from ``start`` on, flattened, of a tensor of ``shape``."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]


Parts = dict[str, list[Part]]


def weights(optimizer: Sliced) -> Parts:
    """This rank's share of the trained parameters; each element is one rank's."""
    return {
        owned.name: [Part(owned.weights, owned.start, tuple(owned.parameter.shape))]
        for owned in optimizer.owned()
    }


def states(optimizer: Sliced) -> Parts:
    """This rank's share of the states."""
    parts: Parts = {}
    saved = optimizer.optimizer.state_dict()
    index = indices(optimizer)
    for owned in optimizer.owned():
        for key, value in saved["state"].get(index[owned.part], {}).items():
            place = place_of(optimizer, key, owned)
            if place.shared and owned.start:
                continue
            # In stage 0 the optimizer has more than this rank answers for.
            first = place_of(optimizer, key, owned._replace(start=owned.part_start)).start
            flat = value.reshape(-1)[place.start - first : place.stop - first]
            parts[f"{owned.name}/{key}"] = [Part(flat, place.start, place.shape)]
    return parts


def restore(
    optimizer: Sliced,
    keys: Callable[[str], Iterable[str]],
    read: Callable[[str, int, int], Tensor],
) -> None:
    """Give the wrapped optimizer this rank's slices of states that were saved by any number of ranks at any stage.

    Args:
        keys: by parameter's name the keys that it has states of.
        read: elements of a state by ``(<parameter>/<key>, start, stop)``, (stop - start,).
    """
    index = indices(optimizer)
    found: dict[int, dict[str, Any]] = {}
    for owned in optimizer.owned(whole_parts=True):
        values: dict[str, Tensor] = {}
        for key in keys(owned.name):
            place = place_of(optimizer, key, owned)
            value = read(f"{owned.name}/{key}", place.start, place.stop)
            values[key] = value.reshape(place.kept)
        if values:
            found[index[owned.part]] = values
    groups = optimizer.optimizer.state_dict()["param_groups"]
    optimizer.optimizer.load_state_dict({"state": found, "param_groups": groups})


def indices(optimizer: Sliced) -> dict[Tensor, int]:
    """The numbers by which the wrapped optimizer's ``state_dict`` calls its parameters."""
    parts = (p for group in optimizer.optimizer.param_groups for p in group["params"])
    return {p: i for i, p in enumerate(parts)}


def place_of(optimizer: Sliced, key: str, owned: Owned) -> StatePlace:
    """Where a state of what is owned lies in that of the whole parameter."""
    return optimizer.optimizer.state_place(key, tuple(owned.parameter.shape), owned.start, owned.stop)
