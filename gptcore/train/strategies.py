"""How a run's processes share its updates: ZeRO in a fixed tree, torch's DistributedDataParallel, or torch's FSDP2."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gptcore.dist import Member, member_of
from gptcore.dist.gather_on_use import blocks_of
from gptcore.optim import FSDPOptimizer
from gptcore.optim.fused import FusedOptimizer
from gptcore.train import optimizers, processes
from gptcore.train.config import TrainConfig
from gptcore.train.sharding import Optimizer, sharded

# Sending buffers with each pass is left out: they are the same everywhere from the start, and no pass changes them.
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"


class Prepared(NamedTuple):
    """``called`` computes the losses whose gradients ``optimizer`` takes: the model, or what it is wrapped in."""

    called: nn.Module
    optimizer: Optimizer


def prepare(config: TrainConfig, model: nn.Module) -> Prepared:
    """``model`` and its optimizer as ``config.parallel`` has them; alone, what needs several processes is left out.

    Raises:
        UserError: settings that do not go with the strategy.
    """
    strategy, alone = config.parallel.strategy, processes.member().ranks == 1
    if strategy == "fsdp2" and not alone:
        _fully_shard(model)
    optimizer = optimizers.build(config.optimizer, model, seed=config.seed)
    if strategy == "zero":
        return Prepared(model, sharded(config, optimizer, model))
    if alone:
        return Prepared(model, optimizer)
    if strategy == "fsdp2":
        return Prepared(model, FSDPOptimizer(optimizer, model))
    options: dict[str, Any] = {_SYNC_BUFFERS: False}
    return Prepared(DistributedDataParallel(model, **options), optimizer)


def _fully_shard(model: nn.Module) -> None:
    """Weights gathered block by block, and gradients summed in f32 whatever the weights are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Frozen parameters stay whole: they have no gradient or state that would be worth dividing.
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "ignored_params": {p for p in model.parameters() if not p.requires_grad},
    }
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def model_of(called: nn.Module) -> nn.Module:
    """The model itself, of what is called in its place."""
    return called.module if isinstance(called, DistributedDataParallel) else called


def place_of(called: nn.Module, optimizer: Optimizer) -> Member:
    """This process among those that share the updates of ``optimizer``."""
    if isinstance(called, DistributedDataParallel):
        return member_of("train.update", called.process_group)
    return Member(None, 0, 1) if isinstance(optimizer, FusedOptimizer) else optimizer.member


@contextlib.contextmanager
def leaf(called: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of one of a rank's leaves, of which the ``last`` sends.

    DistributedDataParallel adds up f32 gradients of several leaves where they are and sends the sum. Gradients of 16
    bits would be rounded with each of them, so every leaf's are sent, and added in f32 (``optimizer.accumulate``).
    """
    waits = isinstance(called, DistributedDataParallel) and not last
    if waits and all(p.dtype == torch.float32 for p in called.parameters()):
        assert isinstance(called, DistributedDataParallel)
        with called.no_sync():
            yield
    else:
        yield


def is_spread(config: TrainConfig) -> bool:
    """Whether no rank has all weights, so that a forward pass is a call of all ranks."""
    parallel = config.parallel
    return parallel.zero == 3 or (parallel.strategy == "fsdp2" and processes.member().ranks > 1)


def let_go(model: nn.Module) -> None:
    """Free what FSDP2 keeps gathered after a forward pass without backward."""
    reshard = getattr(model, "reshard", None)  # of an FSDPModule, whose import takes a second
    if reshard is not None:
        reshard()
