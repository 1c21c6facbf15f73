"""Losses and gradients do not see padding, packing, order, or how a batch is split: 1e-6 of the largest magnitude."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from gptcore.align.losses import advantages, kl, policy_gradient, preference, reward, supervised, values


class Answers(NamedTuple):
    """Whole answers, each a list of numbers per token; every name is one field of the losses below."""

    new: list[torch.Tensor]
    old: list[torch.Tensor]
    reference: list[torch.Tensor]
    advantages: list[torch.Tensor]

    def pick(self, order: list[int]) -> Answers:
        return Answers(*([field[i] for i in order] for field in self))

    @property
    def tokens(self) -> int:
        return sum(len(x) for x in self.new)


LENGTHS = [3, 1, 11, 6, 2, 8]


@pytest.fixture
def answers() -> Answers:
    def one(n: int) -> list[torch.Tensor]:
        new = -torch.rand(n) * 3
        return [new, new + 0.3 * torch.randn(n), new + 0.3 * torch.randn(n), torch.randn(n)]

    return Answers(*map(list, zip(*(one(n) for n in LENGTHS), strict=True)))


class Laid(NamedTuple):
    """Answers laid out: fields in one shape, their mask, the place of each token, and bounds where packed."""

    fields: list[torch.Tensor]
    mask: torch.Tensor
    places: list[torch.Tensor]
    cu_seqlens: torch.Tensor | None


GARBAGE = (0.0, 1e30, float("nan"), float("-inf"))


def padded(answers: Answers, side: str, width: int, garbage: float) -> Laid:
    shape = (len(answers.new), width)
    mask, flat = torch.zeros(shape, dtype=torch.bool), []
    for row, new in enumerate(answers.new):
        n = len(new)
        first = {"right": 0, "left": width - n, "middle": (width - n) // 2}[side]
        mask[row, first : first + n] = True
        flat.append(row * width + first + torch.arange(n))
    return Laid(_fill(answers, shape, flat, garbage), mask, flat, None)


def packed(answers: Answers, prompts: int, garbage: float) -> Laid:
    bounds, flat = [0], []
    for new in answers.new:
        flat.append(bounds[-1] + prompts + torch.arange(len(new)))
        bounds.append(bounds[-1] + prompts + len(new))
    mask = torch.zeros(1, bounds[-1], dtype=torch.bool)
    mask.view(-1)[torch.cat(flat)] = True
    return Laid(
        _fill(answers, mask.shape, flat, garbage), mask, flat, torch.tensor(bounds, dtype=torch.int32)
    )


def _fill(
    answers: Answers, shape: tuple[int, ...], places: list[torch.Tensor], garbage: float
) -> list[torch.Tensor]:
    fields = []
    for field in answers:
        laid = torch.full(shape, garbage)
        laid.view(-1)[torch.cat(places)] = torch.cat(field)
        fields.append(laid)
    return fields


# name -> loss of laid-out answers; ``how`` is aggregation, total and length, as the losses take them
TokenLoss = Callable[..., torch.Tensor]
TOKEN_LOSSES: dict[str, TokenLoss] = {
    "reinforce": lambda f, mask, **how: policy_gradient.reinforce(f[0], f[3], mask, **how),
    "surrogate": lambda f, mask, **how: policy_gradient.surrogate(f[0], f[1], f[3], mask, **how),
    "ppo": lambda f, mask, **how: policy_gradient.ppo(f[0], f[1], f[3], mask, **how).loss,
    "dual clip": lambda f, mask, **how: (
        policy_gradient.ppo(f[0], f[1], f[3], mask, dual_clip=1.1, **how).loss
    ),
    "gspo": lambda f, mask, **how: (
        policy_gradient.ppo(f[0], f[1], f[3], mask, level="sequence", clip=0.05, **how).loss
    ),
    "grpo k2": lambda f, mask, **how: (
        policy_gradient.grpo(f[0], f[1], f[3], mask, kl=kl.k2(f[0], f[2], mask), beta=0.3, **how).loss
    ),
    "grpo k3": lambda f, mask, **how: (
        policy_gradient.grpo(f[0], f[1], f[3], mask, kl=kl.k3(f[0], f[2], mask), beta=0.3, **how).loss
    ),
    "values": lambda f, mask, **how: values.value_loss(f[0], f[3], mask, old_values=f[1], **how).loss,
    "nll": lambda f, mask, **how: supervised.nll(f[0], mask, **how),
    "entropy": lambda f, mask, **how: policy_gradient.entropy_bonus(f[0], mask, **how),
}
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum", "constant"]
losses = pytest.mark.parametrize("name", TOKEN_LOSSES)
aggregations = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def loss_and_gradient(name: str, laid: Laid, **how: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, and its gradient at the tokens of each answer; elsewhere the gradient must be exactly 0."""
    fields = [field.clone() for field in laid.fields]
    fields[0].requires_grad_()
    loss = TOKEN_LOSSES[name](fields, laid.mask, cu_seqlens=laid.cu_seqlens, length=16, **how)
    gradient = torch.autograd.grad(loss, fields[0])[0]
    assert not gradient[~laid.mask].any(), "a gradient outside the mask"
    return loss.detach(), [gradient.view(-1)[places] for places in laid.places]


def agree(a: tuple[torch.Tensor, list[torch.Tensor]], b: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    slopes, expected = torch.cat(a[1]), torch.cat(b[1])
    assert float((slopes - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), (slopes, expected)
    # terms of both signs cancel in the loss; their sizes add up to about what the slopes do
    size = max(float(b[0].abs()), float(expected.abs().sum()))
    assert float((a[0] - b[0]).abs()) <= 1e-6 * size, (a[0], b[0])


@losses
@aggregations
@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_side_width_and_content(
    name: str, aggregation: str, garbage: float, answers: Answers
) -> None:
    whole = loss_and_gradient(name, padded(answers, "right", max(LENGTHS), 0.0), aggregation=aggregation)
    for side in ("right", "left", "middle"):
        for width in (11, 12, 40):
            agree(
                loss_and_gradient(name, padded(answers, side, width, garbage), aggregation=aggregation), whole
            )


@losses
@aggregations
@pytest.mark.parametrize("prompts", [0, 5])
def test_packing(name: str, aggregation: str, prompts: int, answers: Answers) -> None:
    whole = loss_and_gradient(name, padded(answers, "right", max(LENGTHS), 0.0), aggregation=aggregation)
    agree(loss_and_gradient(name, packed(answers, prompts, float("nan")), aggregation=aggregation), whole)


@losses
@aggregations
def test_order(name: str, aggregation: str, answers: Answers) -> None:
    order = [4, 2, 5, 0, 3, 1]
    loss, gradients = loss_and_gradient(
        name, padded(answers.pick(order), "left", 20, 7.0), aggregation=aggregation
    )
    put_back = [gradients[order.index(i)] for i in range(len(order))]
    agree(
        (loss, put_back), loss_and_gradient(name, padded(answers, "right", 11, 0.0), aggregation=aggregation)
    )


@losses
@aggregations
@pytest.mark.parametrize("split", [[[0, 1], [2], [3, 4, 5]], [[2, 3, 4, 5], [0, 1]], [[i] for i in range(6)]])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_micro_batches(
    name: str, aggregation: str, split: list[list[int]], layout: str, answers: Answers
) -> None:
    whole = loss_and_gradient(name, padded(answers, "right", 11, 0.0), aggregation=aggregation)
    total = answers.tokens if aggregation == "token_mean" else len(answers.new)
    loss, gradients = torch.zeros(()), {}
    for part in split:
        some = answers.pick(part)
        laid = padded(some, "left", 15, 3.0) if layout == "padded" else packed(some, 2, 3.0)
        own, slopes = loss_and_gradient(name, laid, aggregation=aggregation, total=total)
        loss = loss + own
        gradients.update(zip(part, slopes, strict=True))
    agree((loss, [gradients[i] for i in range(6)]), whole)


@losses
@aggregations
def test_a_row_of_padding_alone(name: str, aggregation: str, answers: Answers) -> None:
    whole = loss_and_gradient(name, padded(answers, "right", 11, 0.0), aggregation=aggregation)
    laid = padded(answers, "right", 11, 0.0)
    fields = [torch.cat([field, torch.full((2, 11), float("nan"))]) for field in laid.fields]
    mask = torch.cat([laid.mask, torch.zeros(2, 11, dtype=torch.bool)])
    agree(loss_and_gradient(name, Laid(fields, mask, laid.places, None), aggregation=aggregation), whole)


def test_averages_of_micro_batches_are_not_the_average(answers: Answers) -> None:
    whole = loss_and_gradient("nll", padded(answers, "right", 11, 0.0), aggregation="token_mean")[0]
    rows = [padded(answers.pick([i]), "right", 11, 0.0) for i in range(6)]
    parts = [loss_and_gradient("nll", row, aggregation="token_mean")[0] for row in rows]
    assert abs(float(torch.stack(parts).mean() - whole)) > 1e-2 * float(whole)


@pytest.mark.parametrize("split", [[4, 4], [1, 2, 5], [1] * 8])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_in_parts_by_the_moments_of_all(split: list[int], shift_mean: bool) -> None:
    x, mask = 100 + torch.randn(8, 12), torch.rand(8, 12) < 0.4
    mask[3] = False  # a part without a single token
    x[~mask] = float("nan")
    parts = list(zip(x.split(split), mask.split(split), strict=True))
    of = advantages.pooled([advantages.moments(a, m) for a, m in parts])
    whole = advantages.whiten(x, mask, shift_mean=shift_mean)
    got = torch.cat([advantages.whiten(a, m, shift_mean=shift_mean, of=of) for a, m in parts])
    assert int(of.number) == int(mask.sum())
    # distances from a mean of 100 keep an f32's digits of 100
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6 * 100)


# --- losses of pairs, rankings and labels -------------------------------------------------------------------------

DESIRABLE = torch.tensor([True, False, True, True, False, False, True, False])
PAIR_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "dpo": lambda x, _, t: preference.dpo(*x.unbind(1), beta=0.3, total=t).loss,
    "cdpo": lambda x, _, t: preference.dpo(*x.unbind(1), label_smoothing=0.2, total=t).loss,
    "ipo": lambda x, _, t: preference.ipo(*x.unbind(1), total=t).loss,
    "simpo": lambda x, _, t: preference.simpo(x[:, 0], x[:, 1], total=t).loss,
    "orpo": lambda x, _, t: preference.orpo(
        -x[:, 0].exp(), -x[:, 1].exp(), supervised.nll(x[:, :1], x[:, :1] == x[:, :1], total=t), total=t
    ).loss,
    "kto": lambda x, i, t: preference.kto(
        x[:, 0], x[:, 2], DESIRABLE[i], 0.1, desirable_weight=1.3, total=t
    ).loss,
    "pairwise": lambda x, _, t: reward.pairwise(x[:, 0], x[:, 1], margin=0.2, centring=0.1, total=t).loss,
    "ranked": lambda x, _, t: reward.ranked(x, x.detach().argsort(1) // 2, margin=0.1, centring=0.1, total=t).loss,
}  # fmt: skip


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("sizes", [[8], [3, 5], [1, 1, 6], [1] * 8])
def test_pairs_in_any_order_and_any_split(name: str, sizes: list[int]) -> None:
    numbers = torch.randn(8, 4)
    x = numbers.clone().requires_grad_()
    whole = PAIR_LOSSES[name](x, torch.arange(8), None)
    gradient = torch.autograd.grad(whole, x)[0]
    order = torch.randperm(8)
    x = numbers.clone().requires_grad_()
    parts = torch.stack([PAIR_LOSSES[name](x[i], i, 8) for i in order.split(sizes)]).sum()
    split = torch.autograd.grad(parts, x)[0]
    assert abs(float((parts - whole).detach())) <= 1e-6 * abs(float(whole.detach()))
    assert float((split - gradient).abs().max()) <= 1e-6 * float(gradient.abs().max())


@pytest.mark.parametrize("ties", ["half", "skip"])
def test_ranked_does_not_see_answers_that_are_not_there(ties: str) -> None:
    scores, ranks = torch.randn(5, 4), torch.randint(0, 3, (5, 4))
    ranks[:, 0] = 3
    few = reward.ranked(scores, ranks, ties=ties)
    wide = torch.full((5, 7), float("nan"))
    wide_ranks, mask = torch.zeros(5, 7, dtype=torch.long), torch.zeros(5, 7, dtype=torch.bool)
    places = torch.tensor([1, 2, 4, 6])
    wide[:, places], wide_ranks[:, places], mask[:, places] = scores, ranks, True
    wide.requires_grad_()
    many = reward.ranked(wide, wide_ranks, mask, ties=ties)
    torch.testing.assert_close(many.loss, few.loss, rtol=1e-6, atol=0)
    assert (float(many.pairs), float(many.right)) == (float(few.pairs), float(few.right))
    gradient = torch.autograd.grad(many.loss, wide)[0]
    assert gradient.isfinite().all() and not gradient[~mask].any()


@pytest.mark.parametrize("ties", ["half", "skip"])
def test_ranked_does_not_count_prompts_without_a_pair(ties: str) -> None:
    scores, ranks = torch.randn(4, 3), torch.tensor([[0, 1, 2]] * 3 + [[1, 1, 1]])
    mask = torch.tensor([[True] * 3, [True] * 3, [False, True, False], [ties == "skip"] * 3])
    both = reward.ranked(scores, ranks, mask, ties=ties)
    torch.testing.assert_close(
        both.loss, reward.ranked(scores[:2], ranks[:2], ties=ties).loss, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("average", [False, True])
def test_answers_are_summed_alike_in_every_layout(average: bool, answers: Answers) -> None:
    truth = torch.stack([x.mean() if average else x.sum() for x in answers.new])
    for laid in (padded(answers, "left", 17, float("nan")), packed(answers, 3, float("-inf"))):
        got = preference.answer_logprobs(
            laid.fields[0], laid.mask, average=average, cu_seqlens=laid.cu_seqlens
        )
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6)
