"""Batches where the model is, made and sent while it computes: the next ones in a thread, from pinned memory, beside
the device's own work.

A batch is a pure function of its place (update, leaf), so whoever takes one says which are likely to follow; one that
is asked for unexpectedly, as after going back, is made on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gptcore.train.evaluation import host_tensors

Place = tuple[int, int]
"""The index of an update's data, and the number of the leaf in it."""


class DeviceBatch(NamedTuple):
    """What a model's forward takes, on its device, and the batch's ``weight`` in the update."""

    tokens: Tensor
    targets: Tensor
    options: dict[str, Tensor]
    weight: float


class Sender(Protocol):
    """How tensors come to a device."""

    def send(self, tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Begin to copy; what is returned makes the caller's further work wait for the copies, and gives them."""
        ...


class PinnedSender:
    """Copies from pinned memory on a stream of its own, beside what the device computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        with torch.cuda.stream(self.stream):
            # torch keeps the pinned memory until the copy from it is done, and the event is after all copies.
            sent = {
                name: t.pin_memory().to(self.device, non_blocking=True, copy=True)
                for name, t in tensors.items()
            }
            done = torch.cuda.Event()
            done.record(self.stream)

        def take() -> dict[str, Tensor]:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            for t in sent.values():  # made on the other stream: not to be reused before this one has read it
                t.record_stream(stream)
            return sent

        return take


class PlainSender:
    """Copies when they are asked for, where there is nothing to do meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        return lambda: {name: t.to(self.device) for name, t in tensors.items()}


def sender_for(device: torch.device) -> Sender:
    return PinnedSender(device) if device.type == "cuda" else PlainSender(device)


class _Staged(NamedTuple):
    take: Callable[[], dict[str, Tensor]]
    weight: float


class DeviceBatches:
    """``fetch(update, leaf)`` gives the batches of a loader, in a thread once it is known what follows; close it, or
    use it in ``with``.

    ``depth``: how many are on their way at most.
    """

    def __init__(self, fetch: Callable[[int, int], Any], sender: Sender, depth: int = 2) -> None:
        self._fetch, self._sender, self._depth = fetch, sender, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._staged: dict[Place, Future[_Staged]] = {}

    def take(self, place: Place, following: Iterable[Place] = ()) -> DeviceBatch:
        """The batch at ``place``, and then begin those that follow; raises what ``fetch`` raised for this one."""
        future = self._staged.pop(place, None)
        coming = list(following)[: self._depth]
        for other in [p for p in self._staged if p not in coming]:
            self._staged.pop(other).cancel()
        staged = self._stage(place) if future is None else future.result()
        for other in coming:
            if other not in self._staged:
                self._staged[other] = self._thread.submit(self._stage, other)
        tensors = staged.take()
        tokens, targets = tensors.pop("tokens"), tensors.pop("targets")
        return DeviceBatch(tokens, targets, tensors, staged.weight)

    def _stage(self, place: Place) -> _Staged:
        batch = self._fetch(*place)
        return _Staged(self._sender.send(host_tensors(batch)), float(getattr(batch, "weight", 1.0)))

    def close(self) -> None:
        """End the thread; batches made and not handed out are forgotten."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._staged.clear()

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
