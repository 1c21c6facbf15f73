"""One update: micro-batches forward and backward, and the optimizer's step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gptcore.dist import Member, gather_numbers
from gptcore.errors import UserError
from gptcore.optim import LossScaler, ZeroOptimizer
from gptcore.train import strategies
from gptcore.train.config import TrainConfig
from gptcore.train.device_batches import DeviceBatch, DeviceBatches, Place
from gptcore.train.evaluation import Batches, tensors_of
from gptcore.train.leaves import batch_of, of_each_rank, seed
from gptcore.train.routing import RoutingWatch
from gptcore.train.sharding import Optimizer

# Where a loss or a gradient is not finite.
ADVICE = "lower optimizer.lr, lengthen schedule.warmup or set optimizer.max_norm"


class NonFiniteError(UserError):
    """The loss or the gradient became NaN or infinite; the weights were not touched by it.

    ``loss`` and ``grad_norm`` are the update's, as far as they were taken.
    """

    def __init__(self, text: str, loss: float = math.nan, grad_norm: float | None = None) -> None:
        super().__init__(text)
        self.loss = loss
        self.grad_norm = grad_norm


def update(
    config: TrainConfig,
    model: torch.nn.Module,
    optimizer: Optimizer,
    loader: Batches,
    step: int,
    *,
    routing: RoutingWatch | None = None,
    lr: float | None = None,
    batch: int | None = None,
    admit: Callable[[float, float], bool] | None = None,
    scaler: LossScaler | None = None,
    batches: DeviceBatches | None = None,
) -> float:
    """One update, the one with zero-based index ``step``, by all ranks together; returns the mean loss of its leaves.

    Args:
        model, optimizer: as ``strategies.prepare`` gives them, or a model and one of our optimizers over it. A model
            with ``of_update(batches, gather)`` is asked, before the first, what it takes with each of the batches.
        routing: told what the layers of experts did in this rank's leaves.
        lr: the learning rate; None: the schedule's at ``step``.
        batch: the index of the update whose data are taken, other than ``step`` once batches have been skipped.
        admit: asked with loss and gradient norm before a weight is touched; where it answers False, none is.
        scaler: multiplies the loss for backward; where a gradient then overflows, no weight is touched, and the scale
            falls.
        batches: gives the leaves' batches, those of ``loader``, ahead of time.

    Raises:
        NonFiniteError: before anything was written, whether the loss or only a gradient is not finite; on all ranks.
            With a ``scaler`` a gradient only once a smaller scale will not help.
        UserError: leaves that the ranks do not divide.
    """
    member = strategies.place_of(model, optimizer)
    batch = step if batch is None else batch
    of_ranks = _leaves(optimizer, of_each_rank(config, batch, member.ranks), member.ranks)
    leaves = of_ranks[member.rank]
    lr = config.learning_rate(step) if lr is None else lr
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    optimizer.zero_grad()
    shared = _of_update(model, lambda: [batch_of(loader, config, batch, leaf) for leaf in leaves], member)
    own = []
    for leaf in leaves:
        seed(config, step, leaf)
        micro = _taken(config, model, loader, batches, (batch, leaf), leaves)
        weight = micro.weight
        with strategies.leaf(model, leaf == leaves[-1]):
            out = forward(config, model, micro, shared)
            total = objective(out, config, weight)
            (total if scaler is None else scaler.scale(total)).backward()
        if routing is not None:
            routing.add(out)
        if not isinstance(optimizer, ZeroOptimizer) and len(leaves) > 1:
            optimizer.accumulate()
        own.append(weight * float(out.loss.detach()))
    # What is drawn between updates does not depend on who had which leaf.
    seed(config, step, len(leaves) * member.ranks)
    loss = _mean_in_order(of_ranks, gather_numbers(own, member))
    where = f"at step {step + 1} (learning rate {lr:.3g}); {ADVICE}"
    if not math.isfinite(loss):
        optimizer.zero_grad()
        raise NonFiniteError(f"the loss is {loss} {where}", loss)
    # The mean over leaves: their gradients were summed, the kernel divides in its update pass.
    optimizer.step(
        grad_scale=len(leaves) * (1.0 if scaler is None else scaler.factor),
        admit=None if admit is None else functools.partial(admit, loss),
    )
    what = "a gradient is not finite" if optimizer.found_inf else None
    if scaler is not None:
        scaler.update(optimizer.found_inf)
        what = scaler.collapsed()
    if what is not None:
        norm = optimizer.last_grad_norm
        raise NonFiniteError(f"{what} {where}", loss, None if norm is None else float(norm))
    return loss


def _leaves(optimizer: Optimizer, each: int, ranks: int) -> list[range]:
    """The numbers of every rank's leaves: neighbours, unless the optimizer wants them otherwise."""
    if not isinstance(optimizer, ZeroOptimizer):
        return [range(rank * each, (rank + 1) * each) for rank in range(ranks)]
    optimizer.accumulation = each
    return [optimizer.leaves(rank) for rank in range(ranks)]


def _mean_in_order(of_ranks: Sequence[range], losses: Sequence[float]) -> float:
    """Of the ranks' losses, rank by rank, in the order of their leaves' numbers: the same bits whoever had which."""
    numbers = (leaf for of_rank in of_ranks for leaf in of_rank)
    return sum(loss for _, loss in sorted(zip(numbers, losses, strict=True))) / len(losses)


def _of_update(model: torch.nn.Module, batches: Callable[[], list[Any]], member: Member) -> Mapping[str, Any]:
    """What a loss that is no mean over micro-batches takes from all of them: options of every forward."""
    look = getattr(strategies.model_of(model), "of_update", None)
    return {} if look is None else look(batches(), lambda own: gather_numbers(own, member))


def _taken(
    config: TrainConfig,
    model: torch.nn.Module,
    loader: Batches,
    batches: DeviceBatches | None,
    place: Place,
    leaves: Sequence[int],
) -> DeviceBatch:
    """The batch of one of this rank's ``leaves``."""
    if batches is not None:
        return batches.take(place, places_after(place, leaves))
    batch = batch_of(loader, config, *place)
    return DeviceBatch(
        *tensors_of(batch, next(model.parameters()).device), float(getattr(batch, "weight", 1.0))
    )


def places_after(place: Place, leaves: Sequence[int]) -> list[Place]:
    """What an update of ``leaves`` takes after ``place``, and then most likely the next one."""
    batch, leaf = place
    return [(batch, other) for other in leaves if other > leaf] + [(batch + 1, other) for other in leaves]


def forward(
    config: TrainConfig, model: torch.nn.Module, batch: DeviceBatch, shared: Mapping[str, Any]
) -> Any:
    """The model's output for a leaf; ``shared`` are options of every forward of the update."""
    z_loss = {"z_loss": config.z_loss} if config.z_loss else {}
    return model(batch.tokens, batch.targets, **batch.options, **shared, **z_loss)


def objective(out: Any, config: TrainConfig, weight: float) -> torch.Tensor:
    """What is minimised: the loss, by the batch's weight in the update, with all that is added to it."""
    total: torch.Tensor = out.loss + out.z_loss if config.z_loss else out.loss
    if weight != 1.0:
        total = weight * total
    if getattr(out, "balance_loss", None) is not None:
        total = total + out.balance_loss + out.router_z_loss
    return total
