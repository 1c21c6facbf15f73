"""A training step as CUDA graphs: the host starts all of it with a few launches, and waits for nothing but its numbers.

Two things are captured: a leaf, which is forward and backward of one micro-batch, as the first of an update, whose
gradients are made anew, and as any other, which adds to them; and the update, which is norm, clipping and optimizer.
Between them the host does what a graph cannot: it copies the batch to where the graph reads it, writes the learning
rate, and seeds torch's generator, whose captured draws begin from the seed and place it has when a graph is replayed.
So a run draws what it draws without graphs, and has the same losses bit for bit.

The first updates of a shape run as they always do, on the stream that captures later: they make the optimizer's state,
and libraries choose their algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gptcore import backend
from gptcore.optim.fused import FusedOptimizer
from gptcore.train.device_batches import DeviceBatch

CALL = "train.graph"
# Updates of a shape before it is captured.
WARM_UPS = 2
# Shapes that are captured; what comes after runs as without graphs, since each holds memory of its own.
MOST_SHAPES = 8

Shape = tuple[Any, ...]


class Recorder(Protocol):
    """Captures what a function starts on a device, without doing it."""

    def running(self) -> Any:
        """A context in which what is started is in one order with the recordings."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does it each time it is called, with the same memory.

        Raises:
            RuntimeError: something in ``work`` cannot be captured.
        """
        ...

    def numbers(self, values: Tensor) -> Callable[[], list[float]]:
        """Begin to read ``values``; what is returned waits for them."""
        ...

    def elapsed(self) -> Callable[[], float | None]:
        """Tells, once it is done, the seconds that the device took for the last context of :meth:`running`."""
        ...


class CudaRecorder:
    """By CUDA graphs, all in one pool of memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._ends = _timed_events()

    @contextmanager
    def running(self) -> Iterator[None]:
        before = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(before)
        self._ends = _timed_events()
        with torch.cuda.stream(self.stream):
            self._ends[0].record(self.stream)
            yield
            self._ends[1].record(self.stream)
        before.wait_stream(self.stream)

    def elapsed(self) -> Callable[[], float | None]:
        begin, end = self._ends

        def seconds() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return seconds

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are judged: another one copies batches meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def numbers(self, values: Tensor) -> Callable[[], list[float]]:
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        kept.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(values.device))

        def read() -> list[float]:
            done.synchronize()
            numbers: list[float] = kept.tolist()
            return numbers

        return read


def _timed_events() -> tuple[Any, Any]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


class Numbers(NamedTuple):
    """Of an update: the mean loss of its leaves, the gradients' norm before clipping, whether one of them was not
    finite, in which case no weight was touched, and the seconds that it took the device, where that tells."""

    loss: float
    grad_norm: float
    found_inf: bool
    seconds: float | None


class Launched:
    """An update that the device has been given; :meth:`read` waits for it."""

    def __init__(
        self, weights: Sequence[float], read: Callable[[], list[float]], elapsed: Callable[[], float | None]
    ) -> None:
        self._weights, self._read, self._elapsed = weights, read, elapsed

    def read(self) -> Numbers:
        *losses, norm, found_inf = self._read()
        # As without graphs: numbers of Python, in the order of the leaves.
        own = [weight * loss for weight, loss in zip(self._weights, losses, strict=True)]
        bad = bool(found_inf) or not math.isfinite(norm)
        return Numbers(sum(own) / len(own), norm, bad, self._elapsed())


class _Leaf:
    """A recorded leaf, what it reads and the loss that it writes."""

    def __init__(self, batch: DeviceBatch) -> None:
        self.batch = DeviceBatch(
            batch.tokens.clone(),
            batch.targets.clone(),
            {n: t.clone() for n, t in batch.options.items()},
            batch.weight,
        )
        self.loss: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    def read_from(self, batch: DeviceBatch) -> None:
        self.batch.tokens.copy_(batch.tokens)
        self.batch.targets.copy_(batch.targets)
        for name, tensor in self.batch.options.items():
            tensor.copy_(batch.options[name])


class _Shape:
    """What is known of updates of one shape."""

    def __init__(self) -> None:
        self.runs = 0
        self.leaves: list[_Leaf] = []  # the first, and any other
        self.update: Callable[[], None] | None = None
        self.told: Tensor | None = None  # norm and found_inf


class StepGraphs:
    """Updates of ``model`` by ``optimizer``, captured per shape.

    Args:
        forward: ``(batch)`` gives the model's output, whose ``loss`` is read.
        total: ``(output, weight)`` gives what backward begins from.
        seed: ``(step, leaf)`` sets torch's generators.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: FusedOptimizer,
        recorder: Recorder,
        *,
        forward: Callable[[DeviceBatch], Any],
        total: Callable[[Any, float], Tensor],
        seed: Callable[[int, int], None],
        device: torch.device,
    ) -> None:
        self._model, self._optimizer, self.recorder = model, optimizer, recorder
        self._forward, self._total, self._seed = forward, total, seed
        self._shapes: dict[Shape, _Shape] = {}
        self._lr = torch.zeros((), dtype=torch.float64, device=device)
        self.off = False  # after something that could not be captured

    def launch(self, step: int, lr: float, batches: Sequence[DeviceBatch]) -> Launched:
        """Begin the update with zero-based index ``step`` over its leaves' batches."""
        self._model.train()
        batches = [_in_few_shapes(batch) for batch in batches]
        self._lr.fill_(lr)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr
        with self.recorder.running():
            known = self._known(batches)
            if known is not None and known.update is None and known.runs >= WARM_UPS:
                self._record(known, batches)
            replays = known is not None and known.update is not None
            losses = self._replayed(known, step, batches) if replays else self._run(step, batches)
            if known is not None:
                known.runs += 1
            told = known.told if known is not None and replays else self._told()
            assert told is not None
            numbers = self.recorder.numbers(torch.cat([torch.stack(losses).double(), told]))
            # What is drawn between updates does not depend on how many leaves there were.
            self._seed(step, len(batches))
        return Launched([batch.weight for batch in batches], numbers, self.recorder.elapsed())

    def _known(self, batches: Sequence[DeviceBatch]) -> _Shape | None:
        """None for a shape that is not to be captured."""
        if self.off:
            return None
        shape = _shape_of(batches)
        if shape is None:
            backend.note_fallback(CALL, "leaves of several shapes, or padding")
            return None
        if shape not in self._shapes and len(self._shapes) >= MOST_SHAPES:
            backend.note_fallback(CALL, f"more than {MOST_SHAPES} shapes")
            return None
        return self._shapes.setdefault(shape, _Shape())

    # --- without graphs -------------------------------------------------------------------------------------

    def _run(self, step: int, batches: Sequence[DeviceBatch]) -> list[Tensor]:
        self._optimizer.zero_grad()
        losses = []
        for leaf, batch in enumerate(batches):
            self._seed(step, leaf)
            losses.append(self._backward(batch, len(batches)))
        self._optimizer.step(grad_scale=len(batches))
        return losses

    def _backward(self, batch: DeviceBatch, leaves: int) -> Tensor:
        out = self._forward(batch)
        self._total(out, batch.weight).backward()
        if leaves > 1:
            self._optimizer.accumulate()
        loss: Tensor = out.loss.detach()
        return loss

    def _told(self) -> Tensor:
        """(2,) f64: norm and found_inf, which the optimizer has on the device or, where it reads them, here."""
        optimizer = self._optimizer
        values = (optimizer.last_grad_norm, optimizer.found_inf)
        like = self._lr
        return torch.stack(
            [
                v.double().reshape(()) if isinstance(v, Tensor) else like.new_full((), float(v or 0.0))
                for v in values
            ]
        )

    # --- with graphs ----------------------------------------------------------------------------------------

    def _record(self, known: _Shape, batches: Sequence[DeviceBatch]) -> None:
        """Record the first leaf, another one, and the update; where that is not possible, graphs are over."""
        self._optimizer.zero_grad()
        try:
            known.leaves = [self._recorded_leaf(batch, len(batches)) for batch in batches[:2]]

            def update() -> None:
                self._optimizer.step(grad_scale=len(batches))
                known.told = self._told()

            known.update = self.recorder.record(update)
        except RuntimeError as error:
            backend.note_fallback(CALL, str(error).partition("\n")[0])
            known.update, known.leaves, self.off = None, [], True
            self._optimizer.zero_grad()

    def _recorded_leaf(self, batch: DeviceBatch, leaves: int) -> _Leaf:
        leaf = _Leaf(batch)

        def work() -> None:
            leaf.loss = self._backward(leaf.batch, leaves)

        leaf.replay = self.recorder.record(work)
        return leaf

    def _replayed(self, known: _Shape | None, step: int, batches: Sequence[DeviceBatch]) -> list[Tensor]:
        assert known is not None and known.update is not None
        losses = []
        for number, batch in enumerate(batches):
            leaf = known.leaves[min(number, 1)]
            assert leaf.replay is not None
            leaf.read_from(batch)
            self._seed(step, number)
            leaf.replay()
            assert leaf.loss is not None
            losses.append(leaf.loss.clone())  # the next leaf writes there
        known.update()
        return losses


def _in_few_shapes(batch: DeviceBatch) -> DeviceBatch:
    """Packed documents with empty ones at the end, up to a power of two, so that their number makes few shapes."""
    bounds = batch.options.get("cu_seqlens")
    if bounds is None:
        return batch
    missing = (1 << (len(bounds) - 1).bit_length()) + 1 - len(bounds)
    padded = torch.cat([bounds, bounds[-1:].expand(missing)])
    return batch._replace(options={**batch.options, "cu_seqlens": padded})


def _shape_of(batches: Sequence[DeviceBatch]) -> Shape | None:
    """What must be equal for a graph to serve an update; None where none can."""
    shapes = {
        (batch.tokens.shape, batch.weight, *((n, t.shape, t.dtype) for n, t in sorted(batch.options.items())))
        for batch in batches
    }
    if len(shapes) != 1 or any("mask" in batch.options for batch in batches):
        return None  # the number of tokens that count is the host's to know
    return len(batches), *shapes
