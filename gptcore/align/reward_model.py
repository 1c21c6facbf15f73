"""A GPT with a head of one number: how good an answer to a prompt is.

All C(K, 2) pairs of a prompt come from K forwards, answers end to end in one row (Ouyang et al. 2022, section 3.5 and
appendix C.2). The score is read at the answer's last token, found by ``cu_seqlens``, so that no padding and no stop
token that doubles as padding can stand there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from gptcore.align.losses import reward as losses
from gptcore.align.rankings import Ranked, batch_of
from gptcore.checkpoint.huggingface import from_hf_classifier
from gptcore.data.examples import Tokenised, lay_out
from gptcore.data.vocabulary import Tokenizer
from gptcore.errors import UserError
from gptcore.infer import trained
from gptcore.models import GPT
from gptcore.nn.linear import Linear
from gptcore.train.evaluation import tensors_of

_TOKENS = 8192  # of a row that is scored at once


class RewardOutput(NamedTuple):
    """``loss`` (), what is minimised; ``z_loss`` () 0; ``scores`` (S,) f32, detached; ``pairs`` and those ``right``."""

    loss: Tensor
    z_loss: Tensor
    scores: Tensor
    pairs: Tensor
    right: Tensor


class HeldOut(NamedTuple):
    """Mean loss over prompts, share of the pairs that are not tied in the right order, and how many those are."""

    loss: float
    accuracy: float
    pairs: int


class RewardModel(GPT):
    """:class:`GPT` whose ``forward`` compares answers; made by :meth:`over`.

    ``reward_head``: (1, C) and a bias. ``score_mean`` and ``score_std``, in every checkpoint, make scores of references
    0 on average with a deviation of 1.
    """

    reward_head: Linear
    score_mean: Tensor
    score_std: Tensor
    centring: float
    ties: str

    @classmethod
    def over(cls, model: GPT, *, seed: int = 0, centring: float = 0.0, ties: str = "half") -> RewardModel:
        """``model`` itself as a reward model, its weights and adapters kept, with a new head.

        The head is normal with deviation 1 / sqrt(C + 1) (Stiennon et al. 2020, appendix B.1), its bias 0. Adapters
        that are on stay what trains beside it. The words' head is no longer read: it does not train.
        """
        model.__class__ = cls
        made, width = cast(RewardModel, model), model.config.width
        weight = model.token_embedding.weight
        head = Linear(width, 1, device=weight.device, dtype=weight.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.copy_(torch.randn(1, width, generator=generator) * (width + 1) ** -0.5)
            head.bias.zero_()
        made.reward_head = head
        made.register_buffer("score_mean", torch.zeros((), device=weight.device))
        made.register_buffer("score_std", torch.ones((), device=weight.device))
        made.centring, made.ties = centring, ties
        if made.head is not None:
            made.head.requires_grad_(False)
        return made

    @classmethod
    def from_hf(cls, path: str | os.PathLike[str]) -> RewardModel:
        """A Hugging Face model for sequence classification with one label, as reward models are published.

        Raises:
            UserError: as ``checkpoint.from_hf``, and for several labels.
        """
        model, score = from_hf_classifier(path)
        made = cls.over(model)
        with torch.no_grad():
            made.reward_head.weight.copy_(score)
        return made

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor,
        places: Tensor,
        ranks: Tensor,
        margin: Tensor | float = 0.0,
    ) -> RewardOutput:
        """The mean over prompts of the mean loss of their pairs; arguments as ``rankings.batch_of`` has them."""
        scores = self.raw_scores(tokens, cu_seqlens)
        mask = places >= 0
        found = losses.ranked(
            scores[places.clamp(min=0)], ranks, mask, margin=margin, centring=self.centring, ties=self.ties
        )
        return RewardOutput(found.loss, found.loss.new_zeros(()), scores.detach(), found.pairs, found.right)

    def raw_scores(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(S,) f32, differentiable: of each document of tokens (1, N), read at its last token.

        Raises:
            UserError: a document without a token.
        """
        if cu_seqlens.device.type == "cpu" and int(cu_seqlens.diff().min()) < 1:
            raise UserError("a reward model scores answers of at least one token, got an empty one")
        hidden = self.hidden(tokens, cu_seqlens=cu_seqlens).flatten(0, 1)
        last = hidden.index_select(0, cu_seqlens[1:].long() - 1)
        return self.reward_head(last)[:, 0].float()

    @torch.no_grad()
    def scores(self, answers: Sequence[Tokenised], *, normalised: bool = True) -> Tensor:
        """(S,) f32 on the CPU: of answers with their prompts, so many at once as make a row.

        Raises:
            UserError: scores that are not finite.
        """
        was, device = self.training, self.token_embedding.weight.device
        self.eval()
        found = [torch.empty(0)]
        try:
            for group in _groups(answers):
                row = lay_out(group, keep_last=True)
                bounds = torch.from_numpy(row.cu_seqlens).to(device)
                found.append(self.raw_scores(torch.from_numpy(row.tokens).to(device), bounds).cpu())
        finally:
            self.train(was)
        raw = torch.cat(found)
        if not bool(raw.isfinite().all()):
            raise UserError(f"the reward model gives a score that is not finite, to answer {_first_bad(raw)}")
        return (raw - self.score_mean.cpu()) / self.score_std.cpu() if normalised else raw

    def normalise(self, references: Sequence[Tokenised]) -> None:
        """Make scores of ``references`` 0 on average with a deviation of 1 (Ouyang et al. 2022, appendix C.2).

        Raises:
            UserError: fewer than 2, or scores that are all the same, which tells nothing apart.
        """
        raw = self.scores(references, normalised=False).double()
        if len(raw) < 2:
            raise UserError(f"normalisation takes the mean of at least 2 references, got {len(raw)}")
        deviation = float(raw.std())
        if deviation == 0.0:
            raise UserError(
                f"the reward model gives all {len(raw)} references the same score, {float(raw[0]):g}"
            )
        self.score_mean.fill_(float(raw.mean()))
        self.score_std.fill_(deviation)

    @torch.no_grad()
    def losses_of(self, rankings: Sequence[Ranked], *, prompts: int = 16) -> HeldOut:
        """The loss on ``rankings``, ``prompts`` at a time, and how many of their pairs are ordered right."""
        loss, right, pairs, device = 0.0, 0.0, 0, self.token_embedding.weight.device
        for first in range(0, len(rankings), prompts):
            part = rankings[first : first + prompts]
            tokens, targets, options = tensors_of(batch_of(part), device)
            out = self(tokens, targets, **options)
            loss += float(out.loss) * len(part)
            right, pairs = right + float(out.right), pairs + int(out.pairs)
        return HeldOut(loss / max(1, len(rankings)), right / max(1, pairs), pairs)


class Scored(NamedTuple):
    """Of S answers or pairs, (S,): ``mean`` over an ensemble's members, and their ``disagreement``, a standard
    deviation."""

    mean: Tensor
    disagreement: Tensor


class Ensemble:
    """Reward models of several seeds or folds, asked together (Coste et al. 2023, arXiv 2310.02743)."""

    def __init__(self, members: Sequence[RewardModel]) -> None:
        if len(members) < 2:
            raise UserError(f"an ensemble has at least 2 members, got {len(members)}")
        self.members = list(members)

    def scores(self, answers: Sequence[Tokenised]) -> Scored:
        """Normalised scores, which alone can be compared between members."""
        each = self._each(answers)
        return Scored(each.mean(0), each.std(0))

    def differences(self, first: Sequence[Tokenised], second: Sequence[Tokenised]) -> Scored:
        """By how much the first answer of each pair is the better one, and the disagreement on that, which grows with
        the difference itself; see :meth:`preferences`."""
        each = self._each(first) - self._each(second)
        return Scored(each.mean(0), each.std(0))

    def preferences(self, first: Sequence[Tokenised], second: Sequence[Tokenised]) -> Scored:
        """How likely the first answer of each pair is the better one, 0 to 1, by the model that each member was fitted
        as (Bradley and Terry 1952), and the disagreement on that: large where members put the pair in either order."""
        each = (self._each(first, normalised=False) - self._each(second, normalised=False)).sigmoid()
        return Scored(each.mean(0), each.std(0))

    def _each(self, answers: Sequence[Tokenised], *, normalised: bool = True) -> Tensor:
        """(M, S): of every member."""
        return torch.stack([member.scores(answers, normalised=normalised) for member in self.members])


def load(path: str | os.PathLike[str]) -> tuple[RewardModel, Tokenizer]:
    """The reward model of a run or checkpoint, with its normalisation, and its tokenizer.

    Raises:
        UserError: no run or checkpoint, a damaged one, or one that is no reward model's.
    """
    model, tokenizer = trained.load(path, prepare=RewardModel.over)
    return cast(RewardModel, model), tokenizer


def evaluation(
    rankings: Sequence[Ranked], references: Sequence[Tokenised] = ()
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """An ``evaluate`` for training: loss and accuracy on held-out ``rankings``, after which scores are normalised by
    ``references``, by default the best answer of each: so every checkpoint has a normalisation.

    Where all references score alike (a head that has not learnt yet) it is left as it was.
    """
    references = references or [
        one.answers[min(range(len(one.ranks)), key=one.ranks.__getitem__)] for one in rankings
    ]

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        assert isinstance(model, RewardModel)
        found = model.losses_of(rankings)
        with contextlib.suppress(UserError):
            model.normalise(references)
        return {"val_loss": found.loss, "accuracy": found.accuracy}

    return evaluate


class Bin(NamedTuple):
    """Pairs whose better answer is between ``low`` and ``high`` tokens longer, and the share ordered right."""

    low: int
    high: int
    pairs: int
    accuracy: float


class Agreement(NamedTuple):
    """With the ranks of held-out prompts, over pairs that are not tied.

    ``calibration_error``: the mean distance, weighed by pairs, between how often the answer with the higher score is
    the better one and sigmoid of the difference, in ten bins of that (Guo et al. 2017, equation 3). ``by_length`` in
    fifths by how much longer the better answer is.
    """

    accuracy: float
    pairs: int
    calibration_error: float
    by_length: tuple[Bin, ...]


def agreement(model: RewardModel, rankings: Sequence[Ranked]) -> Agreement:
    """How well ``model`` agrees with ``rankings``, how sure it may be, and whether it only counts tokens.

    Raises:
        UserError: no pair that is not tied.
    """
    scores = iter(model.scores([a for one in rankings for a in one.answers], normalised=False).tolist())
    differences, longer = [], []
    for one in rankings:
        own = [(rank, next(scores), len(a.tokens)) for rank, a in zip(one.ranks, one.answers, strict=True)]
        for first, second in itertools.combinations(own, 2):
            if first[0] != second[0]:
                better, worse = sorted((first, second))
                differences.append(better[1] - worse[1])
                longer.append(better[2] - worse[2])
    if not differences:
        raise UserError("agreement: no prompt has two answers of different ranks")
    gap, extra = np.array(differences), np.array(longer)
    right = np.where(gap == 0, 0.5, gap > 0)
    cuts = np.unique(np.quantile(extra, [0.2, 0.4, 0.6, 0.8], method="lower"))
    fifth = np.searchsorted(cuts, extra)
    parts = [np.flatnonzero(fifth == place) for place in np.unique(fifth)]
    bins = tuple(Bin(int(extra[p].min()), int(extra[p].max()), len(p), float(right[p].mean())) for p in parts)
    return Agreement(float(right.mean()), len(gap), _calibration_error(gap, right), bins)


def _calibration_error(gap: np.ndarray, right: np.ndarray) -> float:
    sure = 1.0 / (1.0 + np.exp(-np.abs(gap)))  # 0.5 to 1, that the higher score is the better answer
    place = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    distances = [abs(right[place == b].sum() - sure[place == b].sum()) for b in range(10)]
    return float(sum(distances) / len(gap))


def _groups(answers: Sequence[Tokenised]) -> list[list[Tokenised]]:
    groups: list[list[Tokenised]] = []
    room = 0
    for answer in answers:
        if not groups or room < len(answer.tokens):
            groups.append([])
            room = _TOKENS
        groups[-1].append(answer)
        room -= len(answer.tokens)
    return groups


def _first_bad(raw: Tensor) -> int:
    return int((~raw.isfinite()).nonzero()[0])
