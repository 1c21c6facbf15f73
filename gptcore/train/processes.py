"""The processes that share a run: started by torchrun, one of them (rank 0) speaks for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as c10d

from gptcore.checkpoint import SilentRankError
from gptcore.dist import Member, member_of
from gptcore.errors import UserError

Value = TypeVar("Value")


class LostRankError(UserError):
    """Another process of the run ended or went silent; finished checkpoints are intact."""


@contextlib.contextmanager
def started(device: str, timeout: float) -> Iterator[Member]:
    """This process's place among those that torchrun started; outside of torchrun the only one.

    Args:
        device: "cpu" goes with gloo, "cuda" with NCCL.
        timeout: seconds after which a rank that waits for another gives up.
    """
    ours = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and not c10d.is_initialized()
    if ours:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        c10d.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield member()
    finally:
        if ours:
            c10d.destroy_process_group()


def member() -> Member:
    """This process among all; alone where torch.distributed is not initialised."""
    alone = not (c10d.is_available() and c10d.is_initialized())
    return Member(None, 0, 1) if alone else member_of("train.run")


def first_alone(place: Member, work: Callable[[], object]) -> None:
    """``work`` on rank 0, for which the others wait; its error is an error of all.

    Raises:
        what ``work`` raises, on rank 0; UserError on the others then.
    """
    error: BaseException | None = None
    if place.rank == 0:
        try:
            work()
        except BaseException as caught:
            error = caught
    told = from_first(place, None if error is None else str(error))
    if error is not None:
        raise error
    if told is not None:
        raise UserError(f"rank 0: {told}")


def from_first(place: Member, value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    if place.ranks == 1:
        return value
    told = [value]
    c10d.broadcast_object_list(told, c10d.get_global_rank(place.group, 0), group=place.group)
    return told[0]


def of_each(place: Member, value: Value) -> list[Value]:
    """Every rank's ``value``, by rank, on every rank."""
    found = [value] * place.ranks
    if place.ranks > 1:
        c10d.all_gather_object(found, value, group=place.group)
    return found


@contextlib.contextmanager
def naming_lost_ranks(place: Member, run_dir: Path) -> Iterator[None]:
    """:class:`LostRankError` when another process has gone, whether an exchange or a checkpoint's files showed it."""
    try:
        yield
    except (RuntimeError, c10d.DistError, SilentRankError) as error:
        if place.ranks == 1 or not (isinstance(error, SilentRankError) or _is_of_backend(error)):
            raise
        raise LostRankError(
            f"rank {place.rank} of {place.ranks} stops: another process of the run ended or went silent "
            f"({str(error).splitlines()[0]}); its own output says why. {run_dir} goes on from its last checkpoint "
            "when it is started again, as torchrun --max-restarts does by itself"
        ) from error


def _is_of_backend(error: Exception) -> bool:
    text = str(error)
    signs = (
        "Connection closed by peer",
        "Connection reset",
        "Timed out",
        "timed out",
        "Broken pipe",
        "NCCL",
        "gloo",
    )
    return isinstance(error, (c10d.DistError, torch.distributed.DistBackendError)) or any(
        s in text for s in signs
    )
