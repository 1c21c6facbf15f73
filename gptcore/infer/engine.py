"""From a prompt to text: prefill once, then one token per step, shown as it comes.

Each prompt is prefilled alone and then decoded in a batch with the others of its length, so that neither
its logits' shapes in prefill nor its random numbers depend on what else was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from gptcore.errors import UserError, unknown_name
from gptcore.infer import device_sampling
from gptcore.infer.kv_cache import KVCache
from gptcore.infer.paged_cache import PagedKVCache, PagePool
from gptcore.infer.sampling import SamplingParams, sample
from gptcore.infer.stop_strings import StopStrings

if TYPE_CHECKING:
    from gptcore.data.vocabulary import StreamDecoder, Tokenizer
    from gptcore.models import GPT

FinishReason = Literal["length", "stop", "end"]
Stream = Callable[[int, str], None]

_OVERFLOW = ("error", "slide")


@dataclass
class Timing:
    """Tokens processed and seconds taken by the batch a sequence ran in."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second; 0 where there were none."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, all sequences of the batch together; 0 where there were none."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """What came back for one sequence.

    prompt: the text given. text: what follows it, without stop string and end-of-text token.
    token_ids: every token sampled, those of the stop string and of the end of text included.
    finish_reason: "length" (max_new_tokens reached), "stop" (a stop string), "end" (end-of-text token).
    slides: how often older tokens were dropped because the context was full; 0 unless overflow="slide".
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    slides: int
    timing: Timing


@dataclass
class _Sequence:
    """A sequence under way."""

    index: int  # its place in what generate returns
    number: int  # its number among the samples of its prompt: part of its random numbers
    prompt: str
    ids: list[int]  # the prompt's tokens and those sampled so far
    prompt_length: int
    decoder: StreamDecoder
    stops: StopStrings
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    slides: int = 0

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_length


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    ignore_end: bool = False,
    end_ids: Sequence[int] | None = None,
    overflow: Literal["error", "slide"] = "error",
    stream: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt`` with ``model``.

    ``stream`` is called with each new piece of text. Everything else, errors included, as in
    ``generate_batch``, whose first sample this is.
    """
    return generate_batch(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        ignore_end=ignore_end,
        end_ids=end_ids,
        overflow=overflow,
        stream=None if stream is None else lambda _, piece: stream(piece),
    )[0]


def generate_batch(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    ignore_end: bool = False,
    end_ids: Sequence[int] | None = None,
    overflow: Literal["error", "slide"] = "error",
    stream: Stream | None = None,
) -> list[Generation]:
    """Continue each of ``prompts`` with ``model``, ``num_samples`` times.

    prompts: texts, of which an empty one starts at the tokenizer's end-of-text token, or token ids, as chat templates
        give them.
    num_samples: samples per prompt, which share one prefill. Default 1.
    max_new_tokens: at most this many, at least 0. Default 256.
    temperature, top_k, top_p, seed: see ``SamplingParams``; temperature 0 is greedy.
    stop: strings at which the text ends; they may span tokens. Default none.
    ignore_end: go on after the end-of-text token. Default false.
    end_ids: the tokens that end a text. Default: the tokenizer's end-of-text token.
    overflow: what to do when prompt and max_new_tokens exceed the model's context: "error" refuses before
        anything is computed, "slide" drops the older half of a full context and goes on. Default "error".
    stream: called as stream(i, piece) with each new piece of text of result i, whole characters only.

    Returns the results of the first prompt first. A prompt's result depends on its text, its options and
    the seed only, not on the other prompts, as far as the model's arithmetic doesn't depend on the batch.
    Raises UserError for options out of range, an empty prompt without end-of-text token, a prompt that does
    not fit, a tokenizer with more tokens than the model, and logits that are not finite.
    """
    params = SamplingParams(temperature, top_k, top_p, seed)
    _check(model, tokenizer, max_new_tokens, num_samples, overflow)
    stops = [stop] if isinstance(stop, str) else list(stop)
    sequences = [
        _start(tokenizer, text, stops, place * num_samples + number, number)
        for place, text in enumerate(prompts)
        for number in range(num_samples)
    ]
    context = model.context_length
    for sequence in sequences:
        if overflow == "error":
            _check_fits(sequence.prompt_length, max_new_tokens, context)
        sequence.slides = int(sequence.prompt_length > context)
    default = () if tokenizer.eot is None else (tokenizer.eot,)
    end = frozenset(() if ignore_end else default if end_ids is None else end_ids)
    results: dict[int, Generation] = {}
    with inference(model):
        for group in _by_length(sequences):
            timing = Timing()
            _Run(model, params, max_new_tokens, context, tokenizer.vocab_size, end, stream, timing).group(
                group
            )
            results.update({sequence.index: _finished(sequence, timing) for sequence in group})
    return [results[index] for index in range(len(sequences))]


def _check(model: GPT, tokenizer: Tokenizer, max_new_tokens: int, num_samples: int, overflow: str) -> None:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}, expected at least 1")
    if overflow not in _OVERFLOW:
        raise unknown_name("overflow", overflow, _OVERFLOW)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"vocabulary mismatch: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{model.config.vocab_size}; use the tokenizer the model was trained with"
        )


def _start(
    tokenizer: Tokenizer, prompt: str | Sequence[int], stops: list[str], index: int, number: int
) -> _Sequence:
    if isinstance(prompt, str):
        ids = list(tokenizer.encode(prompt))
    else:
        ids, prompt = [int(token) for token in prompt], tokenizer.decode(prompt)
    if not ids:
        if tokenizer.eot is None:
            raise UserError("the prompt is empty and the tokenizer has no end-of-text token; give a prompt")
        ids = [tokenizer.eot]
    return _Sequence(index, number, prompt, ids, len(ids), tokenizer.stream(), StopStrings(stops))


def _check_fits(length: int, max_new_tokens: int, context: int) -> None:
    # the last token sampled is never fed back, so it takes no place
    if length + max(max_new_tokens - 1, 0) > context:
        raise UserError(
            f"the prompt has {length} tokens and {max_new_tokens} more were asked for, but the model's "
            f"context is {context}; shorten the prompt, ask for at most {max(context - length + 1, 0)}, "
            "or let the context slide"
        )


def _by_length(sequences: list[_Sequence]) -> Iterator[list[_Sequence]]:
    """Sequences that can share a cache, in the order of their first member."""
    groups: dict[int, list[_Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.prompt_length, []).append(sequence)
    yield from groups.values()


@contextmanager
def inference(model: GPT) -> Iterator[None]:
    """Without dropout and without gradients, leaving the model as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _finished(sequence: _Sequence, timing: Timing) -> Generation:
    return Generation(
        prompt=sequence.prompt,
        text="".join(sequence.pieces),
        token_ids=sequence.ids[sequence.prompt_length :],
        finish_reason=sequence.finish_reason or "length",
        slides=sequence.slides,
        timing=timing,
    )


def new_cache(model: GPT, batch: int, capacity: int) -> KVCache:
    """An empty cache of the shape, dtype and device that ``model`` works with."""
    config, weight = model.config, next(model.parameters())
    return KVCache(
        config.num_layers,
        batch,
        model.num_kv_heads,
        config.head_dim,
        capacity,
        dtype=weight.dtype,
        device=weight.device,
    )


def new_pool(model: GPT, num_pages: int, page_size: int = 16) -> PagePool:
    """Pages of the shape, dtype and device that ``model`` works with, for any number of ``PagedKVCache``."""
    config, weight = model.config, next(model.parameters())
    return PagePool(
        config.num_layers,
        model.num_kv_heads,
        config.head_dim,
        num_pages,
        page_size=page_size,
        dtype=weight.dtype,
        device=weight.device,
    )


def prefill(model: GPT, ids: Sequence[int], cache: KVCache | PagedKVCache) -> Tensor:
    """Run the prompt ``ids`` through ``model`` into ``cache`` (batch 1); logits (1, V) of the next token."""
    return model(torch.tensor([ids], dtype=torch.int64, device=_device(model)), cache=cache)


def decode_step(model: GPT, tokens: Sequence[int], cache: KVCache | PagedKVCache) -> Tensor:
    """Append one token to each of the B sequences of ``cache``; logits (B, V) of the next ones."""
    return model(torch.tensor(tokens, dtype=torch.int64, device=_device(model))[:, None], cache=cache)


def _device(model: GPT) -> torch.device:
    return next(model.parameters()).device


@dataclass
class _Run:
    """Generation of one group of sequences of equal length."""

    model: GPT
    params: SamplingParams
    max_new_tokens: int
    context: int
    vocab_size: int  # of the tokenizer; a model's vocabulary may be padded beyond it
    end: frozenset[int]
    stream: Stream | None
    timing: Timing

    def group(self, group: list[_Sequence]) -> None:
        """Prefill, then sample and decode until every sequence of ``group`` has finished."""
        if self.max_new_tokens == 0:
            return
        active = group
        cache, logits = self._prefill(active, self.context)
        self._sample(active, logits)
        while still := [sequence for sequence in active if sequence.finish_reason is None]:
            if cache.length == self.context:
                active = still
                for sequence in active:
                    sequence.slides += 1
                cache, logits = self._prefill(active, max(self.context // 2, 1))
                self._sample(active, logits)
                continue
            started = time.perf_counter()
            if 2 * len(still) <= len(active):
                rows = [row for row, sequence in enumerate(active) if sequence.finish_reason is None]
                cache, active = KVCache.gather([(cache, row) for row in rows]), still
            logits = decode_step(self.model, [sequence.ids[-1] for sequence in active], cache)
            self._sample(active, logits)
            self.timing.decode_seconds += time.perf_counter() - started
            self.timing.decode_tokens += len(still)

    def _prefill(self, sequences: list[_Sequence], window: int) -> tuple[KVCache, Tensor]:
        """A cache of each sequence's last ``window`` tokens and the logits (B, V) of what follows them."""
        started = time.perf_counter()
        windows = [tuple(sequence.ids[-window:]) for sequence in sequences]
        length = len(windows[0])
        left = self.max_new_tokens - sequences[0].generated
        capacity = min(self.context, length + left)
        done: dict[tuple[int, ...], tuple[KVCache, Tensor]] = {}
        for ids in windows:  # samples of one prompt share its prefill
            if ids not in done:
                cache = new_cache(self.model, 1, capacity if len(windows) == 1 else length)
                done[ids] = (cache, prefill(self.model, ids, cache))
                self.timing.prefill_tokens += length
        caches = [done[ids][0] for ids in windows]
        cache = caches[0] if len(caches) == 1 else KVCache.gather([(each, 0) for each in caches], capacity)
        logits = torch.cat([done[ids][1] for ids in windows])
        self.timing.prefill_seconds += time.perf_counter() - started
        return cache, logits

    def _sample(self, sequences: list[_Sequence], logits: Tensor) -> None:
        """Choose the next token of each sequence that is not finished, and show what it completes."""
        live = [(row, one) for row, one in enumerate(sequences) if one.finish_reason is None]
        for (_, sequence), token in zip(live, self._chosen(live, logits[:, : self.vocab_size]), strict=True):
            sequence.ids.append(token)
            self._show(sequence, token)

    def _chosen(self, live: list[tuple[int, _Sequence]], logits: Tensor) -> list[int]:
        """The next token of each of these sequences, whose row of ``logits`` stands beside it."""
        if logits.device.type == "cpu":
            values = logits.float().numpy()
            return [sample(values[row], self.params, one.number, one.generated) for row, one in live]
        rows = torch.tensor([row for row, _ in live], device=logits.device)
        places = np.array([(one.number, one.generated) for _, one in live], np.int64)
        found = device_sampling.sample_rows(logits[rows], self.params, places[:, 0], places[:, 1])
        chosen: list[int] = found.tokens.tolist()
        return chosen

    def _show(self, sequence: _Sequence, token: int) -> None:
        """Add the text that ``token`` completes, and decide whether the sequence ends with it."""
        if token in self.end:
            sequence.finish_reason = "end"
        else:
            self._emit(sequence, sequence.stops.push(sequence.decoder.push(token)))
            if sequence.stops.matched is not None:
                sequence.finish_reason = "stop"
            elif sequence.generated == self.max_new_tokens:
                sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            rest = sequence.stops.push(sequence.decoder.finish()) + sequence.stops.finish()
            self._emit(sequence, rest)

    def _emit(self, sequence: _Sequence, piece: str) -> None:
        if piece:
            sequence.pieces.append(piece)
            if self.stream is not None:
                self.stream(sequence.index, piece)
