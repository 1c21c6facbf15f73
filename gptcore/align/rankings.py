"""Rankings as tokens, and batches of them: all answers to a prompt in one batch element.

Letters: P prompts of a batch, K answers of the prompt with most, S answers in all, N tokens.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptcore.data.chat import Chat
from gptcore.data.examples import Tokenised, lay_out
from gptcore.data.loader import Batch
from gptcore.data.packing import IGNORE
from gptcore.data.permutation import derive, permute
from gptcore.data.records import Ranking
from gptcore.errors import UserError

_PLACE = 5  # so that it draws numbers unrelated to those of other loaders of the same seed


class Ranked(NamedTuple):
    """The answers to one prompt, each with it, as tokens; their ranks, smaller is better; the margin of a pair."""

    answers: tuple[Tokenised, ...]
    ranks: tuple[float, ...]
    margin: float = 0.0


def tokenised(
    rankings: Sequence[Ranking], chat: Chat, *, length: int, margin: float = 0.0, margins: bool = True
) -> tuple[list[Ranked], dict[str, int]]:
    """Rankings as tokens, and how many were left out, by reason.

    Args:
        length: most tokens of an answer with its prompt; prompts with a longer one are left out.
        margin: asked of every pair. margins: whether what a record says is added.
    """
    found: list[Ranked] = []
    left_out: dict[str, int] = {}
    for record in rankings:
        answers = tuple(chat.response(record.prompt, answer) for answer in record.answers)
        longest = max(len(answer.tokens) for answer in answers)
        if longest > length:
            reason = f"an answer with more than {length} tokens"
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        own = record.margin or 0.0 if margins else 0.0
        found.append(Ranked(answers, record.ranks, margin + own))
    return found, left_out


class RankingLoader:
    """Training batches of rankings as a pure function of their number; every epoch in a new order.

    Args:
        rankings: at least ``batch``.
        fingerprint, vocab_size: of the tokenizer that made them.
        batch: prompts of a micro-batch. seed: of the orders.
    """

    def __init__(
        self, rankings: Sequence[Ranked], fingerprint: str, vocab_size: int, *, batch: int, seed: int = 0
    ) -> None:
        if len(rankings) < batch:
            raise UserError(
                f"there are {len(rankings)} rankings to learn from, expected at least data.batch = {batch}"
            )
        self.rankings = list(rankings)
        self.fingerprint, self.vocab_size, self.batch, self.seed = fingerprint, vocab_size, batch, seed
        self._order = functools.lru_cache(maxsize=2)(self._permuted)

    def batch_at(self, step: int) -> Batch:
        """Micro-batch ``step``, counted from the start."""
        return self.samples(step * self.batch, self.batch)

    def samples(self, first: int, count: int) -> Batch:
        """Prompts ``first`` to ``first + count - 1`` of the order. As many in each micro-batch make weights of 1."""
        size = len(self.rankings)
        chosen = [self._order(i // size)[i % size] for i in range(first, first + count)]
        return batch_of([self.rankings[i] for i in chosen])

    def state(self) -> dict[str, Any]:
        """What the order depends on, fit for JSON."""
        digest = hashlib.sha256()
        for one in self.rankings:
            digest.update(repr((one.ranks, one.margin)).encode())
            for answer in one.answers:
                digest.update(np.asarray(answer.tokens, np.int32).tobytes() + b"|")
        return {"seed": self.seed, "batch": self.batch, "rankings": digest.hexdigest()[:16]}

    def _permuted(self, epoch: int) -> list[int]:
        size = len(self.rankings)
        order = permute(np.arange(size), size, derive(self.seed, _PLACE, epoch))
        return [int(i) for i in order]


def batch_of(rankings: Sequence[Ranked]) -> Batch:
    """All answers of ``rankings`` end to end, and as options of the model what belongs together.

    ``places`` (P, K) int64: the number of each answer among the S; -1 where a prompt has fewer. ``ranks`` (P, K) f32;
    ``margin`` (P,) f32.
    """
    answers = [answer for one in rankings for answer in one.answers]
    row = lay_out(answers, keep_last=True)
    most = max(len(one.answers) for one in rankings)
    places = np.full((len(rankings), most), -1, np.int64)
    ranks = np.zeros((len(rankings), most), np.float32)
    number = 0
    for i, one in enumerate(rankings):
        places[i, : len(one.answers)] = np.arange(number, number + len(one.answers))
        ranks[i, : len(one.answers)] = one.ranks
        number += len(one.answers)
    options: Mapping[str, np.ndarray] = {
        "places": places, "ranks": ranks, "margin": np.array([one.margin for one in rankings], np.float32),
    }  # fmt: skip
    targets = np.full_like(row.targets, IGNORE)
    return Batch(row.tokens, targets, row.cu_seqlens, 0, 0, 0, options=options)


def pairs_of(rankings: Sequence[Ranked]) -> list[Ranked]:
    """Every pair that is not tied as a ranking of two: what a pairwise trainer sees."""
    return [
        Ranked((one.answers[a], one.answers[b]), (one.ranks[a], one.ranks[b]), one.margin)
        for one in rankings
        for a in range(len(one.answers))
        for b in range(a + 1, len(one.answers))
        if one.ranks[a] != one.ranks[b]
    ]


def fold_of(count: int, folds: int, member: int, seed: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` prompts member ``member`` of an ensemble learns from, and which it never sees."""
    order = np.random.default_rng((seed, folds)).permutation(count)
    left = set(order[member % folds :: folds].tolist()) if folds else set()
    return [i for i in range(count) if i not in left], sorted(left)
