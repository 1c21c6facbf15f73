"""Many prompts continued at once, token ids in and out, with the log-probability of every token sampled.

The model, the KV cache and the arithmetic of sampling are those of :func:`gptcore.infer.generate`. Prompts of one
length share a cache; rows that have finished leave it. What is kept is O(B·T), and O(B·T·k) where sampling was
truncated, never O(B·T·V).

A sequence gets the same tokens and numbers whatever it is batched with. Its random numbers belong to (seed, sequence,
position). Matrix products of more than ``SMALL`` rows sum in another order than those of fewer, so every product is
always of the one kind or of the other: in prefill the layers' of more and the head's of fewer, unless prompts are of
one token, where all are of more; in decoding those of more where ``batch_size`` allows for them, or else of fewer.
Batches that lack rows are filled up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcore.errors import UserError
from gptcore.infer import device_sampling
from gptcore.infer.batch_sampling import Sampled, sample_rows
from gptcore.infer.engine import Timing, inference, new_cache
from gptcore.infer.kv_cache import KVCache
from gptcore.infer.rollouts import Kept, Rollouts, pack
from gptcore.infer.sampling import SamplingParams
from gptcore.nn.linear import SMALL

if TYPE_CHECKING:
    from gptcore.models import GPT

__all__ = ["Kept", "Rollouts", "rollout"]


def rollout(
    model: GPT,
    prompts: Sequence[Sequence[int] | NDArray[Any]],
    *,
    max_new_tokens: int,
    params: SamplingParams,
    stop_tokens: Sequence[int] = (),
    num_samples: int = 1,
    sequences: Sequence[int] | None = None,
    vocab_size: int | None = None,
    batch_size: int = 512,
) -> Rollouts:
    """Continue each of ``prompts`` with ``model``, ``num_samples`` times, until a stop token or ``max_new_tokens``.

    Args:
        prompts: token ids, each at least one.
        max_new_tokens: most tokens of a response, at least 1; the stop token counts.
        params: temperature, top-k, top-p and seed. Log-probabilities are those after all three.
        stop_tokens: ids that end a response, of which they are the last token.
        num_samples: responses to each prompt, which share its prefill; those of a prompt stand together in the result.
        sequences: the number of each response, which its random numbers belong to; default its place in the result.
        vocab_size: tokens that may be sampled, from 0 on; default the model's.
        batch_size: responses under way at a time, which bounds the cache. At most 64 spares few responses of a large
            model the filling up to 65; the last bits of the numbers are others then.

    Returns:
        :class:`Rollouts`, in the order of ``prompts``.

    Raises:
        UserError: an option out of range, an empty prompt, one that leaves no room in the model's context, a token
            that the model does not have, and logits that are not finite.
    """
    ids = [np.asarray(prompt, dtype=np.int32) for prompt in prompts]
    vocab = model.config.vocab_size if vocab_size is None else vocab_size
    _check(model, ids, max_new_tokens, num_samples, batch_size, vocab)
    count = len(ids) * num_samples
    numbers = np.arange(count) if sequences is None else np.asarray(sequences, dtype=np.int64)
    if numbers.shape != (count,):
        raise UserError(f"sequences has {len(numbers)} numbers, expected {count}, one for each response")
    fewest = SMALL + 1 if batch_size > SMALL else 1
    run = _Run(model, params, max_new_tokens, frozenset(stop_tokens), vocab, numbers, fewest)
    with inference(model):
        for group in _groups(ids, num_samples, batch_size):
            run.group(ids, group, num_samples)
    return pack(
        [ids[i // num_samples] for i in range(count)], run.tokens, run.lengths, run.logprobs, run.entropies,
        run.stopped, run.kept, run.timing,
    )  # fmt: skip


def _check(
    model: GPT, prompts: list[NDArray[np.int32]], new: int, samples: int, batch_size: int, vocab: int
) -> None:
    for name, value in (("max_new_tokens", new), ("num_samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    if not 0 < vocab <= model.config.vocab_size:
        raise UserError(f"vocab_size is {vocab}, expected 1 to the model's {model.config.vocab_size}")
    if not prompts:
        raise UserError("there is no prompt to continue")
    context = model.context_length
    for place, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not len(prompt):
            raise UserError(f"prompt {place} is empty; give at least one token")
        # the last token sampled is never fed back, so it takes no place
        if len(prompt) + new - 1 > context:
            raise UserError(
                f"prompt {place} has {len(prompt)} tokens and up to {new} more were asked for, but the model's "
                f"context is {context}; shorten the prompt or ask for at most {max(context - len(prompt) + 1, 0)}"
            )
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= model.config.vocab_size:
            raise UserError(
                f"prompt {place} has token {low if low < 0 else high}, the model's are 0 to "
                f"{model.config.vocab_size - 1}"
            )


def _groups(ids: list[NDArray[np.int32]], samples: int, size: int) -> list[NDArray[np.int64]]:
    """Places of responses whose prompts have one length, at most ``size`` at a time."""
    lengths = np.repeat([len(prompt) for prompt in ids], samples)
    groups = []
    for length in dict.fromkeys(lengths.tolist()):
        members = np.flatnonzero(lengths == length)
        groups += [members[first : first + size] for first in range(0, len(members), size)]
    return groups


@dataclass
class _Batch:
    """Responses under way: row r of ``cache`` is response ``places[r]``; rows beyond those that live only fill up."""

    cache: KVCache
    places: NDArray[np.int64]
    alive: NDArray[np.bool_]


class _Run:
    """What one call of :func:`rollout` has sampled so far, (B, max_new_tokens) each."""

    def __init__(
        self, model: GPT, params: SamplingParams, new: int, stops: frozenset[int], vocab: int,
        numbers: NDArray[np.int64], fewest: int,
    ) -> None:  # fmt: skip
        self.model, self.params, self.new, self.vocab, self.numbers = model, params, new, vocab, numbers
        self.stops = np.array(sorted(stops), dtype=np.int64)
        self.fewest = fewest  # rows of a step
        shape = (len(numbers), new)
        self.tokens = np.zeros(shape, np.int32)
        self.logprobs, self.entropies = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.lengths = np.zeros(shape[0], np.int64)
        self.stopped = np.zeros(shape[0], bool)
        self.kept: list[tuple[NDArray[np.int64], int, NDArray[np.int64], NDArray[np.int32]]] = []
        self.timing = Timing()

    def group(self, ids: list[NDArray[np.int32]], places: NDArray[np.int64], samples: int) -> None:
        """Prefill the prompts of ``places``, then sample and decode until every response has ended."""
        started = time.perf_counter()
        batch, logits = self._prefill(ids, places, samples)
        self.timing.prefill_seconds += time.perf_counter() - started
        started = time.perf_counter()
        for position in range(self.new):
            self._sample(batch, logits, position)
            if position + 1 == self.new or not batch.alive.any():
                break
            self._compact(batch)
            last = self.tokens[batch.places, position].astype(np.int64)
            logits = self.model(torch.from_numpy(last).to(self._device)[:, None], cache=batch.cache)
        self.timing.decode_seconds += time.perf_counter() - started
        self.timing.decode_tokens += int(self.lengths[places].sum())

    def _prefill(
        self, ids: list[NDArray[np.int32]], places: NDArray[np.int64], samples: int
    ) -> tuple[_Batch, Tensor]:
        """The batch of ``places`` and the logits (rows, V) of what follows; each prompt is run once."""
        prompts, row_of = np.unique(places // samples, return_inverse=True)
        length = len(ids[prompts[0]])
        size = SMALL if length > 1 else len(prompts)
        parts, caches = [], []
        for first in range(0, len(prompts), size):
            some = prompts[first : first + size]
            tokens = np.stack([ids[i] for i in _filled(some, -(-(SMALL + 1) // length))]).astype(np.int64)
            cache = new_cache(self.model, len(tokens), length)
            logits = self.model(torch.from_numpy(tokens).to(self._device), cache=cache)
            parts.append(logits[: len(some)])
            caches += [(cache, row) for row in range(len(some))]
        self.timing.prefill_tokens += len(prompts) * length
        rows = _filled(row_of, self.fewest)
        wide = KVCache.gather([caches[row] for row in rows], length + self.new - 1)
        alive = np.arange(len(rows)) < len(places)
        logits = torch.cat(parts)[torch.from_numpy(rows).to(self._device)]
        return _Batch(wide, _filled(places, self.fewest), alive), logits

    def _sample(self, batch: _Batch, logits: Tensor, position: int) -> None:
        """The next token of each response that has not ended."""
        rows = np.flatnonzero(batch.alive)
        places = batch.places[rows]
        chosen = logits[:, : self.vocab] if len(rows) == len(logits) else logits[rows, : self.vocab]
        numbers, positions = self.numbers[places], np.full(len(rows), position)
        if chosen.device.type == "cpu":
            sampled = sample_rows(chosen.float().numpy(), self.params, numbers, positions)
        else:
            sampled = device_sampling.sample_rows(chosen, self.params, numbers, positions)
        self._keep(places, position, sampled)
        ended = np.isin(sampled.tokens, self.stops)
        self.stopped[places] = ended
        batch.alive[rows[ended]] = False

    def _keep(self, places: NDArray[np.int64], position: int, sampled: Sampled) -> None:
        self.tokens[places, position] = sampled.tokens
        self.logprobs[places, position] = sampled.logprobs
        self.entropies[places, position] = sampled.entropies
        self.lengths[places] = position + 1
        if sampled.kept_ids is not None and sampled.kept_counts is not None:
            self.kept.append((places, position, sampled.kept_counts, sampled.kept_ids))

    def _compact(self, batch: _Batch) -> None:
        """Drop the rows of finished responses once they are a quarter of the cache, whose copy a step or two repay."""
        rows = _filled(np.flatnonzero(batch.alive), self.fewest)
        if 4 * len(rows) <= 3 * len(batch.alive):
            living = int(batch.alive.sum())
            batch.cache = KVCache.gather([(batch.cache, row) for row in rows.tolist()])
            batch.places = batch.places[rows]
            batch.alive = np.arange(len(rows)) < living

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _filled(rows: NDArray[np.int64], fewest: int) -> NDArray[np.int64]:
    """``rows``, their first one repeated until they are ``fewest``."""
    missing = max(0, fewest - len(rows))
    return np.concatenate([rows, np.repeat(rows[:1], missing)])
