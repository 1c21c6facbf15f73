"""Batches as a pure function of (seed, step).

Nothing is drawn and nothing is stored: the samples of a step are computed from its number, so a run
resumes at any step, over any number of ranks, and sees what it would have seen.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from gptcore.data.dataset import TokenDataset, Windows
from gptcore.data.mixture import Mixture
from gptcore.data.packing import IGNORE, cu_seqlens_at, segment_starts
from gptcore.data.permutation import derive, permute, random_below
from gptcore.errors import UserError, unknown_name

MODES = ("shuffled", "random", "ordered")
_PLACE_OF_ORDER, _PLACE_OF_MIXTURE = 1, 2  # so that the two draw unrelated numbers from one seed


class Batch(NamedTuple):
    """``tokens`` and ``targets`` (B, T) int64, contiguous; a target is the token after.

    ``cu_seqlens``: (S + 1,) int32 over all B * T tokens, or None when documents are not told apart.
    ``target_bytes``: UTF-8 bytes of the targets, the divisor of bits per byte. ``target_count``: targets
    that count (not ``IGNORE``). ``step``: the batch's number. ``mask``: (B, T) bool, False for padding, or None
    where there is none. ``options``: further arrays that the model takes by name. ``weight``: of its mean loss in the
    update's (``gptcore.data.examples.leaf_weight``).
    """

    tokens: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray | None
    target_bytes: int
    target_count: int
    step: int
    mask: np.ndarray | None = None
    options: Mapping[str, np.ndarray] = {}  # never written to
    weight: float = 1.0


class _Source:
    """One data set in one order: sample number to window."""

    def __init__(self, data: TokenDataset, length: int, mode: str, key: int) -> None:
        self.data = data
        self._mode = mode
        self._key = key
        self.windows = Windows(data, length, stride=1 if mode == "random" else length)
        # An order is computed in stretches: for one batch alone, numpy's calls would outweigh the work.
        self._stretch = min(4096, self.windows.count)
        self._shuffled = functools.lru_cache(maxsize=4)(self._shuffle)

    def choose(self, numbers: np.ndarray) -> np.ndarray:
        """The window of each of this source's samples, (N,) int64."""
        if self._mode == "random":
            return random_below(self.windows.count, self._key, numbers)
        if self._mode == "ordered":
            return numbers % self.windows.count
        stretches, places = numbers // self._stretch, numbers % self._stretch
        chosen = np.empty_like(numbers)
        for stretch in np.unique(stretches).tolist():
            inside = stretches == stretch
            chosen[inside] = self._shuffled(stretch)[places[inside]]
        return chosen

    def _shuffle(self, stretch: int) -> np.ndarray:
        """The windows of one stretch of samples: a fresh permutation of all of them every epoch."""
        numbers = np.arange(stretch * self._stretch, (stretch + 1) * self._stretch, dtype=np.int64)
        epochs, positions = np.divmod(numbers, self.windows.count)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            positions[inside] = permute(positions[inside], self.windows.count, derive(self._key, epoch))
        return positions


class Loader:
    """Training batches from one data set or a weighted mixture of several.

    ``batch``: rows of a step, over all ranks; ``length``: tokens of a row. ``mode``: ``"shuffled"`` lays
    windows side by side and visits each once per epoch, in a new order every epoch; ``"random"`` begins
    rows anywhere, with replacement (nanoGPT's recipe); ``"ordered"`` is the order of the data.
    ``documents``: whether batches carry ``cu_seqlens``. ``weights``: shares of several data sets, default
    by their tokens. ``rank``, ``world_size``: take this rank's rows of each batch. ``step``: where
    iteration begins.

    Iterating gives batch after batch without end; ``batch_at(step)`` gives any of them.
    """

    def __init__(
        self,
        data: TokenDataset | Sequence[TokenDataset],
        batch: int,
        length: int,
        seed: int = 0,
        *,
        mode: str = "shuffled",
        documents: bool = False,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
    ) -> None:
        sets = [data] if isinstance(data, TokenDataset) else list(data)
        if not sets:
            raise UserError("a loader needs at least one data set, got none")
        if mode not in MODES:
            raise unknown_name("loader mode", mode, MODES)
        if batch < 1 or world_size < 1 or batch % world_size:
            raise UserError(
                f"batch: got {batch} rows for {world_size} ranks, expected a positive multiple of the ranks"
            )
        if not 0 <= rank < world_size:
            raise UserError(f"rank: got {rank}, expected 0 to {world_size - 1}")
        if step < 0:
            raise UserError(f"step: got {step}, expected 0 or more")
        if weights is not None and len(weights) != len(sets):
            raise UserError(f"weights: got {len(weights)} for {len(sets)} data sets, expected one each")
        for other in sets[1:]:
            if (other.fingerprint, other.vocab_size) != (sets[0].fingerprint, sets[0].vocab_size):
                raise UserError("the data sets of a mixture were made with different tokenizers")
        self.batch, self.length, self.seed, self.mode, self.documents = batch, length, seed, mode, documents
        self.rank, self.world_size = rank, world_size
        self.step = step
        self.vocab_size, self.eot, self.fingerprint = sets[0].vocab_size, sets[0].eot, sets[0].fingerprint
        self.token_bytes = sets[0].token_bytes
        keys = [derive(seed, _PLACE_OF_ORDER, number) for number in range(len(sets))]
        self._sources = [_Source(one, length, mode, key) for one, key in zip(sets, keys, strict=True)]
        shares = [one.tokens for one in sets] if weights is None else weights
        self._mixture = Mixture(shares, derive(seed, _PLACE_OF_MIXTURE)) if len(sets) > 1 else None
        self.tokens = sum(one.tokens for one in sets)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many rows are served as the data has windows, side by side."""
        windows = sum(
            max(0, shard.tokens - 1) // self.length for one in self._sources for shard in one.data.shards
        )
        return windows / self.batch

    def batch_at(self, step: int) -> Batch:
        """This rank's rows of batch ``step``."""
        if step < 0:
            raise ValueError(f"batch_at: got step {step}, expected 0 or more")
        rows = self.batch // self.world_size
        return self.samples(step * self.batch + self.rank * rows, rows, step=step)

    def samples(self, first: int, count: int, *, step: int = 0) -> Batch:
        """Samples ``first`` to ``first + count`` of the order, whatever the batch size; for batch ramps."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        if self._mixture is None:
            sources = np.zeros_like(numbers)
        else:
            sources, numbers = self._mixture.locate(numbers)
        rows = np.empty((count, self.length + 1), np.int64)
        begins = np.empty((count, self.length), bool)
        for number, source in enumerate(self._sources):
            mine = sources == number
            windows = source.choose(numbers[mine])
            rows[mine] = source.windows.rows(windows)
            if self.documents:
                begins[mine] = source.windows.segments(windows)
        bounds = cu_seqlens_at(begins) if self.documents else None
        return _batch(rows[:, :-1], rows[:, 1:], bounds, self.token_bytes, step)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch_at(self.step)
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where iteration stands: a few integers and names, fit for JSON."""
        return {
            "step": self.step,
            "seed": self.seed,
            "batch": self.batch,
            "length": self.length,
            "mode": self.mode,
            "tokens": self.tokens,
            "fingerprint": self.fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises ``UserError`` when this loader serves other batches."""
        mine = self.state()
        for key in mine.keys() - {"step"}:
            if state.get(key) != mine[key]:
                raise UserError(
                    f"cannot resume the data order: {key} was {state.get(key)!r}, now it is {mine[key]!r};"
                    " use the same data and settings, or start a new run"
                )
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise UserError(f"cannot resume the data order: got step {step!r}, expected 0 or more")
        self.step = step

    @classmethod
    def from_state(
        cls, data: TokenDataset | Sequence[TokenDataset], state: Mapping[str, Any], **options: Any
    ) -> Loader:
        """A loader that continues where ``state`` was taken; ``options``: what the state does not hold."""
        try:
            loader = cls(data, state["batch"], state["length"], state["seed"], mode=state["mode"], **options)
        except KeyError as error:
            raise UserError(f"cannot resume the data order: the state has no {error}") from None
        loader.restore(state)
        return loader

    def prefetched(self, depth: int = 2) -> Prefetch:
        """The same batches from ``step`` on, made up to ``depth`` ahead in a thread; use it in ``with``."""
        return Prefetch(self, depth)


class Prefetch:
    """Batches of a loader, made ahead in a thread. The loader's ``step`` counts the batches handed out,
    not those made, so its ``state()`` is right at any moment."""

    def __init__(self, loader: Loader, depth: int) -> None:
        if depth < 1:
            raise UserError(f"depth: got {depth}, expected at least 1")
        self._loader = loader
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(loader.step,), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            item: Batch | BaseException
            try:
                item = self._loader.batch_at(step)
            except BaseException as error:  # handed to the reader, who raises it
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._loader.step = item.step + 1
        return item

    def close(self) -> None:
        """End the thread; batches made and not handed out are forgotten."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Evaluation:
    """Held-out batches in the order of the data, every token but each shard's first a target once.

    All batches have the same shape: what is missing at the end of a shard or of the last batch is token 0
    with target ``IGNORE`` and False in the batch's ``mask``. Weigh batches by ``target_count``, or sum and divide
    by ``target_bytes``. ``limit``: at most so many batches, from the front.
    """

    def __init__(
        self,
        data: TokenDataset,
        batch: int,
        length: int,
        *,
        documents: bool = False,
        limit: int | None = None,
    ) -> None:
        if batch < 1 or length < 1:
            raise UserError(f"evaluation: got batch {batch} and length {length}, expected at least 1")
        self.data, self.batch, self.length, self.documents = data, batch, length, documents
        rows = [-(-max(0, shard.tokens - 1) // length) for shard in data.shards]
        self._places = [(shard, row * length) for shard, count in enumerate(rows) for row in range(count)]
        if not self._places:
            raise UserError("the held-out data has no token to predict; hold out more of it")
        whole = -(-len(self._places) // batch)
        self._batches = whole if limit is None else min(limit, whole)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch_at(step) for step in range(self._batches))

    def batch_at(self, step: int) -> Batch:
        """Batch ``step`` of ``len(self)``."""
        if not 0 <= step < self._batches:
            raise IndexError(f"batch_at: got step {step}, expected 0 to {self._batches - 1}")
        tokens = np.zeros((self.batch, self.length), np.int64)
        targets = np.full((self.batch, self.length), IGNORE, np.int64)
        begins, mask = np.zeros((self.batch, self.length), bool), np.zeros((self.batch, self.length), bool)
        for row, (number, start) in enumerate(self._places[step * self.batch : (step + 1) * self.batch]):
            shard = self.data.shards[number]
            ids = shard.read(start, min(start + self.length + 1, shard.tokens))
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
            mask[row, : len(ids) - 1] = True
            if self.documents:
                starts = segment_starts(start, len(ids) - 1, shard.document_ends, self.data.eot)
                begins[row, starts] = True
                begins[row, len(ids) - 1 : len(ids)] = True
        bounds = cu_seqlens_at(begins) if self.documents else None
        batch = _batch(tokens, targets, bounds, self.data.token_bytes, step)
        return batch if mask.all() else batch._replace(mask=mask)


def _batch(
    tokens: np.ndarray, targets: np.ndarray, bounds: np.ndarray | None, token_bytes: np.ndarray, step: int
) -> Batch:
    counted = targets[targets != IGNORE]
    return Batch(
        np.ascontiguousarray(tokens),
        np.ascontiguousarray(targets),
        bounds,
        int(token_bytes[counted].sum(dtype=np.int64)),
        counted.size,
        step,
    )
