"""Learning from preferences without a reward model: DPO and its family, over packed pairs.

The reference is what the model is before the first update: its log-probabilities are numbers of the data, computed
once, so that no second model is in memory while training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gptcore.align.losses import layout
from gptcore.align.losses import preference as losses
from gptcore.align.losses.preference import PreferenceLoss
from gptcore.align.pairs import Preference, batch_of
from gptcore.align.preference_spec import PreferenceSpec
from gptcore.data.examples import Tokenised, lay_out
from gptcore.data.packing import IGNORE
from gptcore.errors import UserError
from gptcore.models import GPT, adapters
from gptcore.train import processes
from gptcore.train.evaluation import tensors_of

Parts = tuple[Tensor, ...]  # of chosen answers and rejected ones

_TOKENS = 8192  # of a row whose log-probabilities are taken at once


class PreferenceOutput(NamedTuple):
    """``loss`` (), what is minimised; ``z_loss`` () 0; of each pair, or answer, detached: the rewards that the policy
    implies, and the log-probabilities of whole answers."""

    loss: Tensor
    z_loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor


class PreferencePolicy(GPT):
    """:class:`GPT` whose ``forward``, given pairs, computes a preference loss; made by :meth:`over`.

    Its parameters and checkpoints are those of the GPT.
    """

    preference: PreferenceSpec

    @classmethod
    def over(cls, model: GPT, spec: PreferenceSpec) -> PreferencePolicy:
        """``model`` itself, which then also takes pairs."""
        model.__class__ = cls
        made = cast(PreferencePolicy, model)
        made.preference = spec
        return made

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        """As ``GPT``; with ``parts`` and ``reference`` as ``pairs.batch_of`` has them :class:`PreferenceOutput`.

        ``point``, of :meth:`of_update`: KTO's reference point; without it that of the batch by itself.
        """
        if "parts" not in options:
            return super().forward(tokens, targets, **options)
        assert targets is not None
        bounds, reference = options["cu_seqlens"], options["reference"]
        parts, mask = options["parts"].tolist(), targets != IGNORE
        out = super().forward(tokens, targets, cu_seqlens=bounds, reduction="none")
        sums = losses.answer_logprobs(-out.loss, mask, cu_seqlens=bounds).split(parts)
        sizes = layout.counts(mask, bounds).split(parts)
        point = options.get("point")
        if point is None and self.preference.loss_type == "kto":
            point = losses.kto_reference_point(*self._mismatched(options))
        found = self._preference_loss(sums, sizes, reference.split(parts), point)
        return PreferenceOutput(
            found.loss, found.loss.new_zeros(()), found.chosen_rewards, found.rejected_rewards,
            sums[0].detach(), sums[1].detach(),
        )  # fmt: skip

    def of_update(
        self, batches: Sequence[Any], gather: Callable[[Sequence[float]], Sequence[float]]
    ) -> dict[str, Tensor]:
        """What ``forward`` is given with each micro-batch of an update: KTO's reference point, which is a mean over all
        of them, on whichever rank, so that the loss does not depend on how an update is cut. Dropout is off.

        Args:
            batches: this process's micro-batches. gather: numbers of this process to those of all.
        """
        if self.preference.loss_type != "kto":
            return {}
        device, was = self.token_embedding.weight.device, self.training
        self.eval()
        try:
            mismatched = [self._mismatched(tensors_of(batch, device)[2]) for batch in batches]
        finally:
            self.train(was)
        each = torch.cat([now - before for now, before in mismatched]).double()
        told = torch.tensor(gather([float(each.sum()), len(each)]), dtype=torch.float64).view(-1, 2).sum(0)
        return {"point": (told[0] / told[1]).clamp(min=0.0).float().to(device)}

    @torch.no_grad()
    def _mismatched(self, options: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of answers to other prompts, and those under the reference, (S',) each."""
        bounds, targets = options["other_bounds"], options["other_targets"]
        out = self(options["other_tokens"], targets, cu_seqlens=bounds, reduction="none")
        return losses.answer_logprobs(-out.loss, targets != IGNORE, cu_seqlens=bounds), options[
            "other_reference"
        ]

    def _preference_loss(
        self, sums: Parts, sizes: Parts, reference: Parts, point: Tensor | None
    ) -> PreferenceLoss:
        """From what there is of chosen answers and of rejected ones."""
        spec, beta = self.preference, self.preference.strength
        if spec.loss_type == "kto":
            assert point is not None
            answers, before = torch.cat(sums), torch.cat(reference)
            good = torch.arange(len(answers), device=answers.device) < len(sums[0])
            return losses.kto(
                answers, before, good, point, beta=beta, desirable_weight=spec.desirable_weight,
                undesirable_weight=spec.undesirable_weight,
            )  # fmt: skip
        if spec.loss_type == "orpo":
            better, worse = sums[0] / sizes[0], sums[1] / sizes[1]
            return losses.orpo(better, worse, -better.mean(), beta=beta)  # each pair alike, however it is cut
        if spec.loss_type == "simpo":
            return losses.simpo(
                sums[0] / sizes[0], sums[1] / sizes[1], beta=beta, gamma=spec.gamma,
                label_smoothing=spec.label_smoothing,
            )  # fmt: skip
        pairs = (*sums, *reference)
        if spec.loss_type == "ipo":
            return losses.ipo(*pairs, beta=beta)
        return losses.dpo(*pairs, beta=beta, label_smoothing=spec.label_smoothing)


@torch.no_grad()
def logprobs_of(model: GPT, answers: Sequence[Tokenised]) -> Tensor:
    """(S,) f32 on the CPU: log-probabilities of whole answers, so many at once as make a row. Several processes, whose
    models and answers are the same, each take some of the rows; the bits are those of one.

    Raises:
        UserError: log-probabilities that are not finite.
    """
    was, device, groups = model.training, model.token_embedding.weight.device, _groups(answers)
    place = processes.member()
    model.eval()
    found: dict[int, Tensor] = {}
    try:
        for number in range(place.rank, len(groups), place.ranks):
            row = lay_out(groups[number])
            bounds = torch.from_numpy(row.cu_seqlens).to(device)
            targets = torch.from_numpy(row.targets).to(device)
            out = model(torch.from_numpy(row.tokens).to(device), targets, cu_seqlens=bounds, reduction="none")
            found[number] = losses.answer_logprobs(-out.loss, targets != IGNORE, cu_seqlens=bounds).cpu()
    finally:
        model.train(was)
    for of_rank in processes.of_each(place, found):
        found |= of_rank
    sums = torch.cat([torch.empty(0), *(found[number] for number in range(len(groups)))])
    if not bool(sums.isfinite().all()):
        raise UserError("the reference gives log-probabilities that are not finite")
    return sums


def with_reference(
    model: GPT, preferences: Sequence[Preference], *, adapters_off: bool = True
) -> list[Preference]:
    """``preferences`` with the log-probabilities that ``model`` gives now: with its adapters off, unless it is the
    adapted model that training starts from."""
    answers = [
        answer
        for one in preferences
        for answer in (one.chosen, one.rejected, one.other)
        if answer is not None
    ]
    off = adapters.off(model) if adapters_off and adapters.names(model) else contextlib.nullcontext()
    with off:
        sums = iter(logprobs_of(model, answers).tolist())
    return [
        one._replace(
            ref_chosen=0.0 if one.chosen is None else next(sums),
            ref_rejected=0.0 if one.rejected is None else next(sums),
            ref_other=0.0 if one.other is None else next(sums),
        )
        for one in preferences
    ]


@torch.no_grad()
def outputs_of(
    model: PreferencePolicy, preferences: Sequence[Preference], *, pairs: int = 16
) -> list[PreferenceOutput]:
    """What ``model`` makes of ``preferences``, ``pairs`` at a time, against one reference point of all of them."""
    device = model.token_embedding.weight.device
    batches = [batch_of(preferences[first : first + pairs]) for first in range(0, len(preferences), pairs)]
    shared = model.of_update(batches, list)
    outs = []
    for batch in batches:
        tokens, targets, options = tensors_of(batch, device)
        outs.append(model(tokens, targets, **options, **shared))
    return outs


def evaluation(
    preferences: Sequence[Preference], *, pairs: int = 16
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """An ``evaluate`` for training, on held-out ``preferences``, ``pairs`` at a time.

    ``val_loss``; of the answers' implied rewards ``rewards_chosen``, ``rewards_rejected``, ``margin`` and ``accuracy``
    (of unpaired answers: of all couples of a good and a bad one); mean log-probabilities ``logprobs_chosen`` and
    ``logprobs_rejected``, of which DPO makes both fall, and ``chosen_change`` against the reference: below 0 the policy
    gives the very answers it should prefer less often than where it started.
    """

    @torch.no_grad()
    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        assert isinstance(model, PreferencePolicy)
        outs = outputs_of(model, preferences, pairs=pairs)
        weights = [len(preferences[first : first + pairs]) for first in range(0, len(preferences), pairs)]
        loss = sum(float(out.loss) * n for out, n in zip(outs, weights, strict=True)) / sum(weights)
        chosen, rejected, good, bad = (
            torch.cat([getattr(out, name).cpu() for out in outs])
            for name in ("chosen_rewards", "rejected_rewards", "chosen_logprobs", "rejected_logprobs")
        )
        paired = len(chosen) == len(rejected) and all(None not in one[:2] for one in preferences)
        gaps = chosen - rejected if paired else (chosen[:, None] - rejected[None]).flatten()
        reference = torch.tensor([one.ref_chosen for one in preferences if one.chosen is not None])
        numbers = {
            "rewards_chosen": chosen, "rewards_rejected": rejected, "margin": gaps, "accuracy": (gaps > 0).float(),
            "logprobs_chosen": good, "logprobs_rejected": bad, "chosen_change": good - reference,
        }  # fmt: skip
        return {"val_loss": loss, **{n: float(x.mean()) for n, x in numbers.items() if len(x)}}

    return evaluate


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
