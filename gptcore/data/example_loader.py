"""Batches of tokenised examples as a pure function of their number: tasks by shares, rows packed, epochs shuffled.

A row holds whole examples, up to ``length`` tokens, and a micro-batch lays ``batch`` rows end to end without a token
of padding; attention stays inside examples (``cu_seqlens``). So packing changes neither a token's loss nor its
gradient, only how many fit into a step.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptcore.data.best_fit import best_fit_decreasing
from gptcore.data.examples import Tokenised, lay_out, leaf_weight
from gptcore.data.loader import Batch
from gptcore.data.packing import IGNORE
from gptcore.data.permutation import derive, permute
from gptcore.errors import UserError

_PLACE_OF_ROWS, _PLACE_OF_EXAMPLES = 3, 4  # so that the two draw unrelated numbers from one seed


class Served(NamedTuple):
    """What every loader of a run tells of its tokenizer: its fingerprint, its size, and bytes of each token (V,)."""

    fingerprint: str
    vocab_size: int
    token_bytes: np.ndarray


class ExampleLoader:
    """Training batches from examples of one task or several.

    Args:
        tasks: examples by the name of their task, each a sequence that is not empty.
        served: of the tokenizer that made them.
        batch: rows of a micro-batch. accumulate: micro-batches of an update. length: tokens of a row.
        seed: of every order.
        packing: several examples to a row, by best-fit decreasing; otherwise one.
        shares: the part of each task in an epoch; by default that of its examples. An epoch has as many examples as
            there are; a task with more than its share is gone through over several epochs, one with less several times.

    Raises:
        UserError: no examples, an example longer than a row, shares that are no positive numbers.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Tokenised]],
        served: Served,
        *,
        batch: int,
        length: int,
        accumulate: int = 1,
        seed: int = 0,
        packing: bool = True,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self.tasks = {name: list(examples) for name, examples in tasks.items()}
        if not self.tasks or not all(self.tasks.values()):
            raise UserError("an example loader needs at least one example of each task, got none")
        self.fingerprint, self.vocab_size, self.token_bytes = served
        self.batch, self.length, self.accumulate, self.seed = batch, length, accumulate, seed
        self.packing = packing
        self._lengths = {name: _lengths(examples, name, length) for name, examples in self.tasks.items()}
        self._masses = {name: _masses(examples) for name, examples in self.tasks.items()}
        self.quotas = _quotas({name: len(examples) for name, examples in self.tasks.items()}, shares)
        self._epoch = functools.lru_cache(maxsize=4)(self._laid)
        self._update = functools.lru_cache(maxsize=4)(self._update_mass)
        self._starts = [0]  # the first row of each epoch, as far as they were asked for

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; those of a mixture may differ by a few."""
        return self._start(1)

    def batch_at(self, step: int) -> Batch:
        """Micro-batch ``step``, counted from the start."""
        return self.samples(step * self.batch, self.batch)

    def samples(self, first: int, count: int) -> Batch:
        """Rows ``first`` to ``first + count - 1`` of the order, end to end, with their weight in their update."""
        own = [place for row in range(first, first + count) for place in self.row(row)]
        each = self.batch * self.accumulate
        weight = leaf_weight(sum(map(self._mass, own)), self._update(first // each), each // count)
        return batch_of([self.tasks[name][number] for name, number in own], self.token_bytes, weight=weight)

    def row(self, number: int) -> list[tuple[str, int]]:
        """The examples of a row: of each its task and its number there."""
        while self._starts[-1] <= number:
            self._start(len(self._starts))
        epoch = bisect.bisect_right(self._starts, number) - 1
        return self._epoch(epoch)[number - self._starts[epoch]]

    def tokens_of_update(self, update: int) -> int:
        """Input tokens of the update with zero-based index ``update``."""
        each = self.batch * self.accumulate
        places = [place for row in range(update * each, (update + 1) * each) for place in self.row(row)]
        return int(sum(self._lengths[name][number] for name, number in places))

    def state(self) -> dict[str, Any]:
        """What the order depends on, fit for JSON."""
        return {
            "seed": self.seed,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "length": self.length,
            "packing": self.packing,
            "quotas": self.quotas,
            "examples": digest(self.tasks),
            "fingerprint": self.fingerprint,
        }

    def _update_mass(self, update: int) -> float:
        each = self.batch * self.accumulate
        return sum(
            self._mass(place) for row in range(update * each, (update + 1) * each) for place in self.row(row)
        )

    def _mass(self, place: tuple[str, int]) -> float:
        return float(self._masses[place[0]][place[1]])

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        return self._starts[epoch]

    def _laid(self, epoch: int) -> list[list[tuple[str, int]]]:
        """The rows of one epoch, in their order."""
        places: list[tuple[str, int]] = []
        for number, (name, quota) in enumerate(self.quotas.items()):
            places += [(name, one) for one in self._chosen(number, name, epoch * quota, quota)]
        rows = [[place] for place in places]
        if self.packing:
            lengths = np.array([self._lengths[name][number] for name, number in places])
            rows = [[places[item] for item in row] for row in best_fit_decreasing(lengths, self.length)]
        order = permute(np.arange(len(rows)), len(rows), derive(self.seed, _PLACE_OF_ROWS, epoch))
        return [rows[place] for place in order]

    def _chosen(self, number: int, name: str, first: int, count: int) -> list[int]:
        """A task's examples ``first`` to ``first + count - 1``, in an order that is new in each pass over them."""
        size = len(self.tasks[name])
        passes, positions = np.divmod(np.arange(first, first + count, dtype=np.int64), size)
        for one in np.unique(passes).tolist():
            inside = passes == one
            key = derive(self.seed, _PLACE_OF_EXAMPLES, number, one)
            positions[inside] = permute(positions[inside], size, key)
        return [int(position) for position in positions]


class ExampleEvaluation:
    """Held-out examples in their order, packed into batches of at most ``tokens`` tokens (an example more at most).

    ``limit``: at most so many batches, from the front. Weights of examples do not count.
    """

    def __init__(
        self, examples: Sequence[Tokenised], served: Served, *, tokens: int, limit: int | None = None
    ) -> None:
        if not examples:
            raise UserError("there is no held-out example; hold out more of them")
        self._token_bytes = served.token_bytes
        groups: list[list[Tokenised]] = [[]]
        room = tokens
        for example in examples:
            if groups[-1] and room < len(example.tokens) - 1:
                groups.append([])
                room = tokens
            groups[-1].append(example._replace(weight=1.0))
            room -= len(example.tokens) - 1
        self._groups = groups if limit is None else groups[:limit]

    def __len__(self) -> int:
        return len(self._groups)

    def batch_at(self, step: int) -> Batch:
        """Batch ``step`` of ``len(self)``."""
        return batch_of(self._groups[step], self._token_bytes)


def batch_of(examples: Sequence[Tokenised], token_bytes: np.ndarray, *, weight: float = 1.0) -> Batch:
    """Examples end to end as a batch for training; weights of examples, where they differ from 1, are its options."""
    row = lay_out(examples)
    counted = row.targets[row.targets != IGNORE]
    return Batch(
        row.tokens,
        row.targets,
        row.cu_seqlens,
        int(token_bytes[counted].sum(dtype=np.int64)),
        counted.size,
        0,
        options={} if row.weights is None else {"weights": row.weights},
        weight=weight,
    )


def digest(tasks: Mapping[str, Sequence[Tokenised]]) -> str:
    """Sixteen hexadecimal digits that differ where examples do."""
    found = hashlib.sha256()
    for name, examples in tasks.items():
        found.update(f"{name}\n{len(examples)}\n".encode())
        for example in examples:
            found.update(np.asarray(example.tokens, np.int32).tobytes())
            found.update(np.packbits(example.loss_mask).tobytes())
            found.update(np.float64(example.weight).tobytes())
    return found.hexdigest()[:16]


def examples_proportional(sizes: Mapping[str, int], cap: int = 0) -> dict[str, float]:
    """The share of each task: as its examples are to all, of which at most ``cap`` (0: no bound) count for a task.

    Raffel et al. 2020, section 3.5.2; FLAN (Wei et al. 2022) has cap 3,000.
    """
    counted = {name: float(min(size, cap) if cap else size) for name, size in sizes.items()}
    whole = sum(counted.values())
    return {name: size / whole for name, size in counted.items()}


def _quotas(sizes: Mapping[str, int], shares: Mapping[str, float] | None) -> dict[str, int]:
    """Examples of each task in an epoch, at least 1: those there are, or the shares of so many, the largest remainders
    rounded up."""
    if shares is None:
        return dict(sizes)
    if shares.keys() != sizes.keys() or not all(0.0 < share < float("inf") for share in shares.values()):
        raise UserError(
            f"shares: got {dict(shares)}, expected one positive number for each of {', '.join(sizes)}"
        )
    total, whole = sum(sizes.values()), sum(shares.values())
    exact = {name: total * shares[name] / whole for name in sizes}
    quotas = {name: max(1, int(value)) for name, value in exact.items()}
    rest = max(0, total - sum(quotas.values()))
    for name in sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))[:rest]:
        quotas[name] += 1
    return quotas


def _lengths(examples: Sequence[Tokenised], task: str, length: int) -> np.ndarray:
    lengths = np.array([len(example.tokens) - 1 for example in examples], np.int64)
    if lengths.max() > length:
        wrong = int(np.argmax(lengths > length))
        raise UserError(
            f"example {wrong}{f' of {task}' if task else ''} has {lengths[wrong] + 1} tokens, expected at most "
            f"{length + 1} for rows of {length}"
        )
    return lengths


def _masses(examples: Sequence[Tokenised]) -> np.ndarray:
    """What a mean over each example's targets is taken over: their number, by the example's weight."""
    masses = np.array([example.targets * example.weight for example in examples])
    if masses.min() <= 0:
        raise UserError(f"example {int(np.argmin(masses))} has no token to learn")
    return masses
