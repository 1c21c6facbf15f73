"""One update: micro-batches forward and backward, and the optimizer's step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.optim.fused import FusedOptimizer
from gptcore.train.config import TrainConfig
from gptcore.train.evaluation import Batches, tensors_of
from gptcore.train.routing import RoutingWatch
from gptcore.train.run_directory import RunDirectory


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
    optimizer: FusedOptimizer,
    loader: Batches,
    step: int,
    *,
    routing: RoutingWatch | None = None,
    lr: float | None = None,
    batch: int | None = None,
    admit: Callable[[float, float], bool] | None = None,
) -> float:
    """One update, the one with zero-based index ``step``; returns the mean loss of its micro-batches.

    Args:
        routing: told what the layers of experts did.
        lr: the learning rate; None: the schedule's at ``step``.
        batch: the index of the update whose data are taken, other than ``step`` once batches have been skipped.
        admit: asked with loss and gradient norm before a weight is touched; where it answers False, none is.

    Raises:
        NonFiniteError: before anything was written, whether the loss or only a gradient is not finite.
    """
    device = next(model.parameters()).device
    micro_batches = config.micro_batches(step if batch is None else batch)
    count = len(micro_batches)
    lr = config.learning_rate(step) if lr is None else lr
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    optimizer.zero_grad()
    loss = 0.0
    for micro in micro_batches:
        tokens, targets, options = tensors_of(loader.batch_at(micro), device)
        z_loss = {"z_loss": config.z_loss} if config.z_loss else {}
        out = model(tokens, targets, **options, **z_loss)
        _total(out, config).backward()
        if routing is not None:
            routing.add(out)
        if count > 1:
            optimizer.accumulate()
        loss += float(out.loss.detach())
    loss /= count
    if not math.isfinite(loss):
        raise _non_finite(config, step, lr, f"the loss is {loss}", loss)
    # The mean over micro-batches: their gradients were summed, the kernel divides in its update pass.
    optimizer.step(grad_scale=float(count), admit=None if admit is None else functools.partial(admit, loss))
    if optimizer.found_inf:
        raise _non_finite(config, step, lr, "a gradient is not finite", loss, optimizer.last_grad_norm)
    return loss


def _total(out: Any, config: TrainConfig) -> torch.Tensor:
    """What is minimised: the loss with all that is added to it."""
    total: torch.Tensor = out.loss + out.z_loss if config.z_loss else out.loss
    if getattr(out, "balance_loss", None) is not None:
        total = total + out.balance_loss + out.router_z_loss
    return total


def _non_finite(
    config: TrainConfig, step: int, lr: float, what: str, loss: float, norm: float | None = None
) -> NonFiniteError:
    directory = RunDirectory(config.run_dir).checkpoints
    there = checkpoint.steps(directory)
    kept = f"the checkpoint of step {there[-1]} in {directory} is intact" if there else "no checkpoint yet"
    text = (
        f"{what} at step {step + 1} (learning rate {lr:.3g}); {kept}; "
        "lower optimizer.lr, lengthen schedule.warmup or set optimizer.max_norm"
    )
    return NonFiniteError(text, loss, norm)
