"""A run on a device: batches that come ahead of time, and graphs of its updates where nothing stands against them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch

from gptcore import backend
from gptcore.errors import UserError
from gptcore.optim import LossScaler
from gptcore.optim.fused import FusedOptimizer
from gptcore.train import strategies
from gptcore.train.config import TrainConfig
from gptcore.train.device_batches import DeviceBatches, sender_for
from gptcore.train.graph import CALL, CudaRecorder, Launched, Recorder, StepGraphs
from gptcore.train.guard import Guard
from gptcore.train.leaves import batch_of, of_each_rank, seed
from gptcore.train.measure import due
from gptcore.train.routing import RoutingWatch
from gptcore.train.run_state import Run
from gptcore.train.sharding import Optimizer
from gptcore.train.step import ADVICE, NonFiniteError, forward, objective, places_after
from gptcore.train.stop import StopRequest


def refuse_without(device: torch.device) -> None:
    """Raises UserError where ``device`` is a GPU that there is not, or that no kernel runs on."""
    if device.type != "cuda":
        return
    why = backend.why_no_kernels(device)
    if why is None and not torch.cuda.is_available():
        why = "torch sees no CUDA device"
    if why is not None:
        raise UserError(f"device: got '{device}', but {why}; see gptcore info, or set device = \"cpu\"")


@contextlib.contextmanager
def prepared(now: Run) -> Iterator[None]:
    """Within it a run on CUDA has ``now.batches``, and ``now.graphs`` if ``obstacle`` names nothing."""
    device = torch.device(now.config.device)
    if not _is_asynchronous(device):
        yield
        return
    with DeviceBatches(
        functools.partial(batch_of, now.loader, now.config), sender_for(device)
    ) as now.batches:
        why = obstacle(now.config, now.called, now.optimizer, now.guard, now.routing, now.scaler)
        if why is None:
            now.graphs = graphs_of(now, _recorder_of(now))
        elif now.config.graphs:
            backend.note_fallback(CALL, why)
        yield


def _is_asynchronous(device: torch.device) -> bool:
    """Whether it computes while the host goes on."""
    return device.type == "cuda"


def _recorder_of(now: Run) -> Recorder:
    return CudaRecorder(torch.device(now.config.device))


def obstacle(
    config: TrainConfig,
    called: torch.nn.Module,
    optimizer: Optimizer,
    guard: Guard,
    routing: RoutingWatch | None,
    scaler: LossScaler | None,
) -> str | None:
    """Why the updates of a run cannot be captured, in a few words; None where they can, as far as is known before."""
    if not config.graphs:
        return "graphs are off"
    if not isinstance(optimizer, FusedOptimizer) or strategies.model_of(called) is not called:
        return "several processes, or leaves added in a fixed tree (parallel.fixed_tree)"
    if guard.decides_before:
        return "a recovery policy that looks at an update before it is applied (skip)"
    if scaler is not None:
        return "a loss scale, which follows from each update"
    if routing is not None:
        return "experts, whose routing is watched in each update"
    if hasattr(called, "of_update"):
        return "a loss that takes something from all batches of an update"
    if config.memory.activation_checkpointing != "none" and _drops_out(called):
        return "checkpointed blocks that draw random numbers"
    return None


def _drops_out(model: torch.nn.Module) -> bool:
    return any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.modules())


def graphs_of(now: Run, recorder: Recorder) -> StepGraphs:
    """Of the updates of ``now``."""
    config, optimizer = now.config, now.optimizer
    assert isinstance(optimizer, FusedOptimizer)
    return StepGraphs(
        now.called,
        optimizer,
        recorder,
        forward=lambda batch: forward(config, now.called, batch, {}),
        total=lambda out, weight: objective(out, config, weight),
        seed=lambda step, leaf: seed(config, step, leaf),
        device=torch.device(config.device),
    )


def renew(now: Run) -> None:
    """Begin anew with graphs: after the optimizer's state or settings, which they hold, were exchanged."""
    now.ahead = None
    if now.graphs is not None:
        now.graphs = graphs_of(now, now.graphs.recorder)


def update(now: Run, stop: StopRequest) -> tuple[float, float]:
    """The next update, by graphs; its loss and gradient norm.

    Where nobody looks at the weights between it and the one after, the device is given that one too before its numbers
    are waited for, so that it never waits for the host.

    Raises:
        NonFiniteError: no weight was touched.
    """
    launched, now.ahead = now.ahead or _launch(now, now.step), None
    if not _is_looked_at(now, now.step + 1, stop):
        now.ahead = _launch(now, now.step + 1)
    told = launched.read()
    now.device_seconds += told.seconds or 0.0
    if math.isfinite(told.loss) and not told.found_inf:
        return told.loss, told.grad_norm
    what = "a gradient is not finite" if math.isfinite(told.loss) else f"the loss is {told.loss}"
    lr = now.course.learning_rate(now.step)
    where = f"at step {now.step + 1} (learning rate {lr:.3g}); {ADVICE}"
    raise NonFiniteError(f"{what} {where}", told.loss, told.grad_norm)


def _is_looked_at(now: Run, step: int, stop: StopRequest) -> bool:
    """Whether anything but the next update follows once ``step`` updates are done."""
    config = now.config
    every = (config.evaluation.every, config.sample.every, config.checkpoint.every)
    ends = step >= config.steps or bool(stop.signal)
    return ends or any(due(step, one) for one in every) or bool(now.course.due(step))


def _launch(now: Run, step: int) -> Launched:
    assert now.graphs is not None and now.batches is not None
    data = now.course.batch(step)
    leaves = range(of_each_rank(now.config, data, 1))
    places = [(data, leaf) for leaf in leaves]
    taken = [now.batches.take(place, places_after(place, leaves)) for place in places]
    return now.graphs.launch(step, now.course.learning_rate(step), taken)
