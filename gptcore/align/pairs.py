"""Preferences as tokens, and batches of them: chosen answers, then rejected ones, end to end.

Letters: P pairs of a batch, S sequences in it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptcore.data.chat import Chat
from gptcore.data.examples import Tokenised, lay_out
from gptcore.data.loader import Batch
from gptcore.data.permutation import derive, permute
from gptcore.data.records import Labelled, Ranking
from gptcore.errors import UserError

_PLACE = 6  # so that it draws numbers unrelated to those of other loaders of the same seed


class Preference(NamedTuple):
    """A pair as tokens, with the log-probabilities of either answer under the reference; of KTO one answer is None.

    ``other``: for KTO, the prompt with the answer to another one.
    """

    chosen: Tokenised | None
    rejected: Tokenised | None
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0
    other: Tokenised | None = None
    ref_other: float = 0.0

    @property
    def answers(self) -> list[Tokenised]:
        """Those that are there to learn from, the chosen one first."""
        return [answer for answer in (self.chosen, self.rejected) if answer is not None]


def tokenised(
    records: Sequence[Ranking | Labelled], chat: Chat, *, length: int
) -> tuple[list[Preference], dict[str, int]]:
    """Records as tokens, and how many were left out, by reason: of rankings the best and the worst answer.

    Args:
        length: most tokens of an answer with its prompt.
    """
    found: list[Preference] = []
    left_out: dict[str, int] = {}
    for record in records:
        if isinstance(record, Labelled):
            one = chat.response(record.prompt, record.completion)
            preference = Preference(one, None) if record.label else Preference(None, one)
        else:
            chosen, rejected = (chat.response(record.prompt, a) for a in (record.chosen, record.rejected))
            preference = Preference(chosen, rejected)
            if np.array_equal(chosen.tokens, rejected.tokens):
                _count(left_out, "the answers differ in nothing that is a token")
                continue
        if max(len(answer.tokens) for answer in preference.answers) > length:
            _count(left_out, f"an answer with more than {length} tokens")
            continue
        found.append(preference)
    return found, left_out


def with_others(preferences: Sequence[Preference]) -> list[Preference]:
    """Beside each answer its prompt with the next one's answer, from which KTO takes its reference point (Ethayarajh et
    al. 2024, section 4.1); the last one has the first one's.

    Raises:
        UserError: fewer than 2.
    """
    if len(preferences) < 2:
        raise UserError("kto wants an answer to another prompt: expected at least 2 preferences")
    following = [*preferences[1:], preferences[0]]
    return [
        one._replace(other=_crossed(one.answers[0], after.answers[0]))
        for one, after in zip(preferences, following, strict=True)
    ]


def _crossed(asked: Tokenised, answered: Tokenised) -> Tokenised:
    prompt = asked.tokens[: int(np.argmax(asked.loss_mask))].tolist()
    return Tokenised.of(prompt, answered.tokens[int(np.argmax(answered.loss_mask)) :].tolist())


class PairLoader:
    """Training batches of preferences as a pure function of their number; every epoch in a new order.

    Args:
        preferences: at least ``batch``.
        fingerprint, vocab_size: of the tokenizer that made them.
        batch: pairs of a micro-batch. seed: of the orders.
    """

    def __init__(
        self,
        preferences: Sequence[Preference],
        fingerprint: str,
        vocab_size: int,
        *,
        batch: int,
        seed: int = 0,
    ) -> None:
        if len(preferences) < batch:
            raise UserError(
                f"there are {len(preferences)} preferences to learn from, expected at least data.batch = {batch}"
            )
        self.preferences = list(preferences)
        self.fingerprint, self.vocab_size, self.batch, self.seed = fingerprint, vocab_size, batch, seed
        self._order = functools.lru_cache(maxsize=2)(self._permuted)

    def batch_at(self, step: int) -> Batch:
        """Micro-batch ``step``, counted from the start."""
        return self.samples(step * self.batch, self.batch)

    def samples(self, first: int, count: int) -> Batch:
        """Pairs ``first`` to ``first + count - 1`` of the order. As many in each micro-batch make weights of 1."""
        size = len(self.preferences)
        chosen = [self._order(i // size)[i % size] for i in range(first, first + count)]
        return batch_of([self.preferences[i] for i in chosen])

    def state(self) -> dict[str, Any]:
        """What the order depends on, fit for JSON."""
        digest = hashlib.sha256()
        for one in self.preferences:
            for answer in (one.chosen, one.rejected):
                digest.update(
                    b"-" if answer is None else np.asarray(answer.tokens, np.int32).tobytes() + b"|"
                )
        return {"seed": self.seed, "batch": self.batch, "preferences": digest.hexdigest()[:16]}

    def _permuted(self, epoch: int) -> list[int]:
        size = len(self.preferences)
        return [int(i) for i in permute(np.arange(size), size, derive(self.seed, _PLACE, epoch))]


def batch_of(preferences: Sequence[Preference]) -> Batch:
    """Chosen answers, then rejected ones, end to end; as options of the model ``parts`` (2,) int64, how many of the S
    sequences are of either, and ``reference`` (S,) f32. KTO's answers to other prompts are a row of their own, which
    teaches nothing: ``other_tokens`` and ``other_targets`` (1, N'), ``other_bounds`` and ``other_reference`` (S',)."""
    chosen = [(one.chosen, one.ref_chosen) for one in preferences if one.chosen is not None]
    rejected = [(one.rejected, one.ref_rejected) for one in preferences if one.rejected is not None]
    row = lay_out([answer for part in (chosen, rejected) for answer, _ in part])
    options: dict[str, np.ndarray] = {
        "parts": np.array([len(chosen), len(rejected)], np.int64),
        "reference": np.array([value for _, value in (*chosen, *rejected)], np.float32),
    }
    others = [(one.other, one.ref_other) for one in preferences if one.other is not None]
    if others:
        crossed = lay_out([answer for answer, _ in others])
        options |= {
            "other_tokens": crossed.tokens, "other_targets": crossed.targets, "other_bounds": crossed.cu_seqlens,
            "other_reference": np.array([value for _, value in others], np.float32),
        }  # fmt: skip
    return Batch(row.tokens, row.targets, row.cu_seqlens, 0, row.target_count, 0, options=options)


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1
