"""The road's reward model: a scalar head on a copy of the fine-tuned model, trained on rankings of K answers.

Each answer goes through the model once, all answers of a batch end to end in one row; the loss takes all C(K, 2) pairs
of a prompt (:func:`gptcore.align.losses.reward.ranked`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gptcore.align.losses.reward import ranked
from gptcore.data.examples import Tokenised, lay_out
from gptcore.data.permutation import derive, permute
from gptcore.data.records import Ranking, text_of
from gptcore.data.vocabulary import Tokenizer
from gptcore.models import GPT

_TOKENS = 16384  # of a forward pass that only scores


class RewardLoss(NamedTuple):
    """What training minimises, and how many pairs were in order."""

    loss: Tensor
    z_loss: Tensor
    pairs: Tensor
    right: Tensor


class RewardModel(nn.Module):
    """A score for a prompt with its answer, read at the last token: ``scale`` · (w · hidden) + ``bias``."""

    scale: Tensor
    bias: Tensor

    def __init__(self, trunk: GPT) -> None:
        super().__init__()
        self.trunk = trunk
        self.weight = nn.Parameter(torch.zeros(trunk.config.width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def forward(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor, ranks: Tensor, places: Tensor, **_: Any
    ) -> RewardLoss:
        """Of answers end to end, (1, N): ``places`` (P, K) says which answer is whose, -1 none; ``ranks`` (P, K)."""
        scores = self._raw(tokens, cu_seqlens)
        there = places >= 0
        out = ranked(scores[places.clamp(min=0)], ranks, there)
        return RewardLoss(out.loss, out.loss.new_zeros(()), out.pairs, out.right)

    def _raw(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = self.trunk.hidden(tokens, cu_seqlens=cu_seqlens)[0]
        return (hidden[cu_seqlens[1:].long() - 1].float() * self.weight).sum(-1)

    @torch.no_grad()
    def scores(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """(B,) float64 of token sequences, prompt and answer with the token that ends it, where one does."""
        self.eval()
        found, group, room = [], [], _TOKENS
        for place, sequence in enumerate(sequences):
            group.append(Tokenised(np.asarray(sequence, np.int32), np.zeros(len(sequence), bool)))
            room -= len(sequence)
            if room <= 0 or place == len(sequences) - 1:
                row = lay_out(group, keep_last=True)
                raw = self._raw(torch.from_numpy(row.tokens), torch.from_numpy(row.cu_seqlens))
                found.append((raw * self.scale + self.bias).double().numpy())
                group, room = [], _TOKENS
        return np.concatenate(found)

    def normalise(self, scores: np.ndarray) -> None:
        """Make ``scores``, which this model gave, have mean 0 and standard deviation 1 from now on."""
        deviation = max(float(scores.std()), 1e-6)
        self.bias.sub_(float(scores.mean())).div_(deviation)
        self.scale.div_(deviation)


class RankingBatch(NamedTuple):
    """Answers end to end with what the loss wants to know of them."""

    tokens: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray
    options: Mapping[str, np.ndarray]


class RankingLoader:
    """Batches of ``batch`` rankings, each seen once an epoch, in an order drawn from ``seed``."""

    def __init__(self, rankings: Sequence[Ranking], tokenizer: Tokenizer, batch: int, seed: int) -> None:
        self.rankings, self.batch, self.seed = list(rankings), batch, seed
        self.fingerprint, self.vocab_size = tokenizer.fingerprint, tokenizer.vocab_size
        self._end = tokenizer.eot
        self._ids = [
            [tokenizer.encode(text_of(r.prompt) + answer) for answer in r.answers] for r in self.rankings
        ]

    def batch_at(self, step: int) -> RankingBatch:
        """Batch ``step``, counted from the start."""
        numbers = np.arange(step * self.batch, (step + 1) * self.batch)
        count = len(self.rankings)
        chosen = [
            int(permute(np.array([number % count]), count, derive(self.seed, int(number // count)))[0])
            for number in numbers
        ]
        return self.of(chosen)

    def of(self, chosen: Sequence[int]) -> RankingBatch:
        """The rankings with these numbers."""
        most = max(len(self._ids[number]) for number in chosen)
        places = np.full((len(chosen), most), -1, np.int64)
        ranks = np.zeros((len(chosen), most), np.float32)
        examples: list[Tokenised] = []
        for row, number in enumerate(chosen):
            for column, ids in enumerate(self._ids[number]):
                places[row, column] = len(examples)
                ranks[row, column] = self.rankings[number].ranks[column]
                ended = np.array([*ids, self._end], np.int32)
                examples.append(Tokenised(ended, np.zeros(len(ended), bool)))
        row_of = lay_out(examples, keep_last=True)
        options: dict[str, np.ndarray] = {"ranks": ranks, "places": places}
        return RankingBatch(row_of.tokens, row_of.targets, row_of.cu_seqlens, options)


@torch.no_grad()
def pair_accuracy(model: RewardModel, loader: RankingLoader) -> tuple[float, int]:
    """The share of untied pairs of all the loader's rankings that ``model`` orders right, and how many there are."""
    model.eval()
    right = pairs = 0.0
    for first in range(0, len(loader.rankings), 64):
        batch = loader.of(range(first, min(first + 64, len(loader.rankings))))
        tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        options = {name: torch.from_numpy(array) for name, array in batch.options.items()}
        out = model(tokens, targets, cu_seqlens=torch.from_numpy(batch.cu_seqlens), **options)
        right, pairs = right + float(out.right), pairs + float(out.pairs)
    return right / max(pairs, 1.0), int(pairs)
