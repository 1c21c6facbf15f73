"""What a call allocates, as torch's allocator sees it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch


class Allocations(NamedTuple):
    """Bytes beyond those before the call: the most at once, and what is left of it afterwards."""

    peak: int
    left: int


def allocations(call: Callable[[], object]) -> Allocations:
    """Of CPU tensors that ``call`` makes and drops; kernels' scratch, which torch does not see, is not among them."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Allocations(peak, now)


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):  # what other tests left may be fake
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
