"""The leaves of an update: groups of sequences, each through forward and backward by itself, on one of the ranks."""

from __future__ import annotations

from typing import Any, cast

import torch

from gptcore.data.permutation import derive
from gptcore.errors import UserError
from gptcore.train.config import TrainConfig
from gptcore.train.evaluation import Batches, Samples


def count(config: TrainConfig, step: int) -> int:
    """Leaves of the update with zero-based index ``step``.

    Raises:
        UserError: where the batch ramp has come to no whole number of them.
    """
    sequences = len(config.sequences(step))
    if sequences % config.grain:
        raise UserError(
            f"parallel.grain: {config.grain} sequences do not divide the {sequences} of update {step + 1}"
        )
    return sequences // config.grain


def of_each_rank(config: TrainConfig, step: int, ranks: int) -> int:
    """How many leaves of an update a rank has.

    Raises:
        UserError: the ranks do not divide the leaves.
    """
    leaves = count(config, step)
    if leaves % ranks:
        raise UserError(
            f"update {step + 1} has {leaves} leaves of {config.grain} sequences, which {ranks} processes do not "
            "divide; change data.accumulate, parallel.grain or the number of processes"
        )
    return leaves // ranks


def batch_of(loader: Batches, config: TrainConfig, step: int, leaf: int) -> Any:
    """The batch of one leaf."""
    first = config.sequences(step).start + leaf * config.grain
    if config.grain == config.data.batch:
        return loader.batch_at(first // config.grain)
    if not hasattr(loader, "samples"):
        raise UserError(
            f"parallel.grain: {config.grain} is not data.batch, and {type(loader).__name__} serves whole batches only"
        )
    return cast(Samples, loader).samples(first, config.grain)


def seed(config: TrainConfig, step: int, leaf: int) -> None:
    """Dropout and routing draw what this leaf draws, on whichever rank and after whatever came before."""
    torch.manual_seed(derive(config.seed, step, leaf) >> 1)
