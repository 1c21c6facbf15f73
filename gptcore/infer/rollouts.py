"""Sampled responses as packed arrays: sequences laid end to end, numbers of response tokens laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptcore.infer.engine import Timing


class Kept(NamedTuple):
    """The tokens that truncated sampling had left: those of response token i are ``ids[offsets[i] : offsets[i + 1]]``.

    ids: (K,) int32, rising within a token. offsets: (R + 1,) int64.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def of(self, tokens: NDArray[np.int64]) -> Kept:
        """Those of the response tokens ``tokens``, in that order."""
        counts = np.diff(self.offsets)[tokens]
        offsets = _offsets(counts)
        return Kept(self.ids[_ranges(self.offsets[tokens], counts)], offsets)


@dataclass(frozen=True)
class Rollouts:
    """B prompts, each with a response; N tokens in all, R of them in responses.

    tokens: (N,) int32, prompt and response, sequence after sequence. cu_seqlens: (B + 1,) int32 bounds the sequences.
    prompt_lengths: (B,) int64. response_offsets: (B + 1,) int64 bounds the responses in what follows.
    logprobs: (R,) f32 nats, of each response token under the distribution it was sampled from.
    entropies: (R,) f32 nats, of that distribution.
    stopped: (B,) bool: ended by a stop token; the others have max_new_tokens.
    kept: what truncation left of that distribution; None where every token was possible.
    timing: tokens and seconds of prefill and of decoding.
    """

    tokens: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    prompt_lengths: NDArray[np.int64]
    response_offsets: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    entropies: NDArray[np.float32]
    stopped: NDArray[np.bool_]
    kept: Kept | None
    timing: Timing

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """(B,) tokens of each response, the stop token included."""
        return np.diff(self.response_offsets)

    @property
    def response_places(self) -> NDArray[np.int64]:
        """(R,) where each response token stands among the N tokens."""
        return _ranges(self.cu_seqlens[:-1] + self.prompt_lengths, self.response_lengths)

    @property
    def finish_reasons(self) -> list[str]:
        """(B,) "stop" or "length"."""
        return ["stop" if each else "length" for each in self.stopped]

    def prompt(self, i: int) -> NDArray[np.int32]:
        """The token ids of prompt i."""
        start = int(self.cu_seqlens[i])
        return self.tokens[start : start + int(self.prompt_lengths[i])]

    def response(self, i: int) -> NDArray[np.int32]:
        """The token ids of response i, the stop token included."""
        return self.tokens[
            int(self.cu_seqlens[i]) + int(self.prompt_lengths[i]) : int(self.cu_seqlens[i + 1])
        ]

    def select(self, rows: Sequence[int] | NDArray[Any]) -> Rollouts:
        """Sequences ``rows``, in that order."""
        chosen = np.asarray(rows, dtype=np.int64)
        lengths = np.diff(self.cu_seqlens)[chosen]
        answer = self.response_places_of(chosen)
        return Rollouts(
            tokens=self.tokens[_ranges(self.cu_seqlens[:-1][chosen], lengths)],
            cu_seqlens=_offsets(lengths).astype(np.int32),
            prompt_lengths=self.prompt_lengths[chosen],
            response_offsets=_offsets(self.response_lengths[chosen]),
            logprobs=self.logprobs[answer],
            entropies=self.entropies[answer],
            stopped=self.stopped[chosen],
            kept=None if self.kept is None else self.kept.of(answer),
            timing=self.timing,
        )

    def response_places_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the tokens of the responses ``rows`` stand among the R response tokens."""
        return _ranges(self.response_offsets[:-1][rows], self.response_lengths[rows])


def pack(
    prompts: Sequence[NDArray[np.int32]],
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    entropies: NDArray[np.float32],
    stopped: NDArray[np.bool_],
    kept: Sequence[tuple[NDArray[np.int64], int, NDArray[np.int64], NDArray[np.int32]]] = (),
    timing: Timing | None = None,
) -> Rollouts:
    """:class:`Rollouts` of prompts and responses in rows (B, T) with ``lengths`` (B,) tokens that count.

    ``kept``: for each step sampled its rows, its position, and for these rows how many tokens were left and which.
    """
    counted = np.arange(tokens.shape[1]) < lengths[:, None]
    whole = [part for i, prompt in enumerate(prompts) for part in (prompt, tokens[i, : lengths[i]])]
    prompt_lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    return Rollouts(
        tokens=np.concatenate(whole).astype(np.int32, copy=False),
        cu_seqlens=_offsets(prompt_lengths + lengths).astype(np.int32),
        prompt_lengths=prompt_lengths,
        response_offsets=_offsets(lengths),
        logprobs=logprobs[counted],
        entropies=entropies[counted],
        stopped=stopped,
        kept=_joined(kept, _offsets(lengths)) if kept else None,
        timing=timing or Timing(),
    )


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """The responses of all ``parts``, one after the other, as if one call had sampled them; seconds are the longest."""
    if len(parts) == 1:
        return parts[0]
    timings = [part.timing for part in parts]
    kept = [part.kept for part in parts if part.kept is not None]
    return Rollouts(
        tokens=np.concatenate([part.tokens for part in parts]),
        cu_seqlens=_offsets(np.concatenate([np.diff(part.cu_seqlens) for part in parts])).astype(np.int32),
        prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
        response_offsets=_offsets(np.concatenate([part.response_lengths for part in parts])),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        entropies=np.concatenate([part.entropies for part in parts]),
        stopped=np.concatenate([part.stopped for part in parts]),
        kept=None
        if not kept
        else Kept(
            np.concatenate([sets.ids for sets in kept]),
            _offsets(np.concatenate([np.diff(sets.offsets) for sets in kept])),
        ),
        timing=Timing(
            sum(timing.prefill_tokens for timing in timings),
            max(timing.prefill_seconds for timing in timings),
            sum(timing.decode_tokens for timing in timings),
            max(timing.decode_seconds for timing in timings),
        ),
    )


def _joined(
    steps: Sequence[tuple[NDArray[np.int64], int, NDArray[np.int64], NDArray[np.int32]]],
    response_offsets: NDArray[np.int64],
) -> Kept:
    """The sets of all steps, in the order of the response tokens."""
    counts = np.zeros(response_offsets[-1], np.int64)
    for rows, position, own, _ in steps:
        counts[response_offsets[rows] + position] = own
    offsets = _offsets(counts)
    ids = np.empty(offsets[-1], np.int32)
    for rows, position, own, chosen in steps:
        ids[_ranges(offsets[response_offsets[rows] + position], own)] = chosen
    return Kept(ids, offsets)


def _offsets(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """(n + 1,): where pieces of ``lengths`` laid end to end begin, and the end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """``starts[i], ..., starts[i] + lengths[i] - 1`` for each i, end to end."""
    shift = np.asarray(starts, np.int64) - _offsets(lengths)[:-1]
    return np.arange(int(np.sum(lengths)), dtype=np.int64) + np.repeat(shift, lengths)
