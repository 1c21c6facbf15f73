"""Bugs that other trainers had, each by its name: what they did is written out, and ours must differ."""

from __future__ import annotations

import math

import pytest
import torch

from gptcore.align.losses import (
    advantages,
    aggregation,
    distribution,
    kl,
    policy_gradient,
    preference,
    reward,
    supervised,
    values,
)
from gptcore.errors import UserError

NAN = float("nan")


def test_trl_3750_score_on_the_first_padding_token() -> None:
    """The score went to the place after the last token, where no advantage is taken (also trl #5338)."""
    mask = torch.tensor([[True, True, True, False, False]])
    rewards = advantages.token_rewards(torch.tensor([7.0]), torch.zeros(1, 5), mask, 0.0)
    assert rewards.tolist() == [[0.0, 0.0, 7.0, 0.0, 0.0]]
    got = advantages.gae(rewards, torch.zeros(1, 5), mask, lam=0.0)
    assert got.advantages.tolist() == [[0.0, 0.0, 7.0, 0.0, 0.0]]


def test_trl_2022_entropy_summed_over_padding() -> None:
    """Entropy ran over padding and came out negative."""
    logits = torch.randn(2, 6, 11)
    mask = torch.tensor([[True] * 2 + [False] * 4, [True] * 5 + [False]])
    each = distribution.entropy(logits)
    each[~mask] = -1e4
    got = policy_gradient.entropy_bonus(each, mask)
    assert 0 < float(got) <= math.log(11)
    torch.testing.assert_close(got, each[mask].mean())


def test_trl_7024_padding_in_the_advantage() -> None:
    """Log-probabilities of padding took part in reward-to-go."""
    mask = torch.tensor([[False, True, True, False]])
    dirty = torch.tensor([[50.0, 1.0, 2.0, -90.0]])
    assert advantages.discounted(dirty, mask).tolist() == [[0.0, 3.0, 2.0, 0.0]]


def test_trl_6803_metrics_over_padding() -> None:
    """KL, ratio and clip share were means over all places."""
    mask = torch.tensor([[True, True, False, False, False, False]])
    new = torch.tensor([[0.5, 0.0, 9.0, 9.0, 9.0, 9.0]])
    got = policy_gradient.ppo(new, torch.zeros(1, 6), torch.ones(1, 6), mask)
    assert float(got.clip_share) == 0.5
    assert float(got.ratio) == pytest.approx((math.exp(0.5) + 1) / 2, rel=1e-6)
    assert float(got.approx_kl) == pytest.approx((math.exp(0.5) - 1.5) / 2, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("content", [NAN, float("inf"), float("-inf")])
def test_verl_6361_nan_times_zero_in_masked_kl(estimator: str, content: float) -> None:
    """A mask that multiplies keeps NaN, in the loss or only in the gradient."""
    mask = torch.tensor([[True, True, False]])
    new = torch.tensor([[-1.0, -2.0, content]], requires_grad=True)
    old, a = torch.tensor([[-1.0, -2.0, content]]), torch.tensor([[1.0, -1.0, content]])
    reference = torch.tensor([[-1.5, -1.0, content]])
    got = policy_gradient.grpo(new, old, a, mask, kl=kl.estimate(estimator, new, reference, mask), beta=0.1)
    gradient = torch.autograd.grad(got.loss, new)[0]
    assert got.loss.isfinite() and gradient.isfinite().all() and float(gradient[0, 2]) == 0.0
    critic = torch.tensor([[0.1, 0.2, content]], requires_grad=True)
    value = values.value_loss(critic, reference, mask, old_values=old)
    assert torch.autograd.grad(value.loss, critic)[0].isfinite().all() and value.loss.isfinite()


def test_areal_1346_advantage_of_a_sequence_polluted_by_masked_places() -> None:
    """Group statistics and whitening counted masked places."""
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    a = torch.tensor([[1.0, 2.0, 3.0, 1e6], [4.0, -1e6, 1e6, NAN]])
    white = advantages.whiten(a, mask)
    expected = (torch.tensor([1.0, 2, 3, 4]) - 2.5) / torch.tensor([1.0, 2, 3, 4]).std()
    torch.testing.assert_close(white[mask], expected, rtol=1e-5, atol=1e-6)
    assert not white[~mask].any()


def test_rlhf_book_216_rewards_taken_for_returns() -> None:
    """The critic was fitted to rewards, so it never saw what comes later."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    got = advantages.gae(rewards, torch.zeros(1, 3), mask, lam=1.0)
    assert got.returns.tolist() == [[1.0, 1.0, 1.0]] != rewards.tolist()


def test_trl_4159_log_probabilities_at_another_temperature() -> None:
    """The sampler's were of the logits divided by T, the trainer's of the logits: ratios far from 1 at once."""
    logits, tokens = 3 * torch.randn(4, 7, 50), torch.randint(50, (4, 7))
    sampler = (logits / 0.7).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    mask = torch.ones(4, 7, dtype=torch.bool)
    right = distribution.sampled_logprobs(logits, tokens, temperature=0.7)
    wrong = distribution.sampled_logprobs(logits, tokens)
    a = torch.randn(4, 7)
    got, bad = (policy_gradient.ppo(x, sampler, a, mask) for x in (right, wrong))
    assert float(got.approx_kl) < 1e-10 and float(got.clip_share) == 0.0
    assert float(got.ratio) == pytest.approx(1.0, abs=1e-5)
    assert float(bad.approx_kl) > 0.1 and float(bad.clip_share) > 0.1


@pytest.mark.parametrize("truncation", ["top_k", "top_p"])
def test_trl_6789_log_probabilities_without_the_truncation(truncation: str) -> None:
    """The mass that top-k and top-p cut off was missing in the trainer, which biases every ratio downwards."""
    logits = 2 * torch.randn(5, 3, 20)
    p, ids = logits.softmax(-1).sort(-1, descending=True)
    inside = torch.arange(20) < 4 if truncation == "top_k" else p.cumsum(-1) - p < 0.6
    keep = torch.where(inside, ids, distribution.NOTHING)
    tokens = ids[..., 0]
    sampler = (p[..., 0] / (p * inside).sum(-1)).log()
    torch.testing.assert_close(
        distribution.sampled_logprobs(logits, tokens, keep=keep), sampler, rtol=1e-5, atol=1e-6
    )
    assert float((distribution.sampled_logprobs(logits, tokens) - sampler).max()) < 0
    with pytest.raises(ValueError, match="not among those that were kept"):
        distribution.sampled_logprobs(logits, ids[..., -1], keep=keep)


def test_trl_5815_sequence_ratio_summed_rather_than_averaged() -> None:
    """A hundred tokens each half a percent off: the product of ratios is 0.6, their mean 0.995 (also #5814)."""
    new = torch.full((1, 100), -0.005)
    mask = torch.ones(1, 100, dtype=torch.bool)
    got = policy_gradient.ppo(new, torch.zeros(1, 100), torch.ones(1), mask, level="sequence")
    assert float(got.ratio) == pytest.approx(math.exp(-0.005), abs=1e-6)
    assert math.exp(float(new.sum())) < 0.61 and float(got.clip_share) == 0.0


@pytest.mark.parametrize("parts", [2, 4])
def test_transformers_34191_loss_scaled_by_accumulation_steps(parts: int) -> None:
    """Micro-batches' means were averaged, though their token counts differ (also axolotl #2262, trl #2604, unsloth
    #3527)."""
    logprobs, mask = -torch.rand(8, 30), torch.arange(30) < torch.tensor([30, 2, 17, 1, 1, 25, 3, 9])[:, None]
    whole = supervised.nll(logprobs, mask)
    pieces = list(zip(logprobs.chunk(parts), mask.chunk(parts), strict=True))
    total = int(mask.sum())
    ours = sum(supervised.nll(x, m, total=total) for x, m in pieces)
    theirs = sum(supervised.nll(x, m) for x, m in pieces) / parts
    torch.testing.assert_close(ours, whole, rtol=1e-6, atol=0)
    assert abs(float(theirs - whole)) > 1e-3


def test_trl_1623_the_end_of_a_response_outside_the_mask() -> None:
    """The loss must see the token that ends the response, or its probability is never learned (also #2059, #5988)."""
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    tokens, end = torch.tensor([[3, 2, 4]]), 2
    logprobs = distribution.sampled_logprobs(logits, tokens)
    loss = supervised.nll(logprobs, torch.tensor([[True, True, True]]))
    gradient = torch.autograd.grad(loss, logits)[0]
    assert float(gradient[0, end, 4]) < 0  # the end token becomes more probable


def test_a_mask_of_ones_where_the_template_marks_nothing_is_not_made_up() -> None:
    """Megatron-Bridge #3359: no mark in the template meant training on everything. An empty mask is an error."""
    with pytest.raises(ValueError, match="the mask has no True"):
        supervised.nll(-torch.rand(2, 5), torch.zeros(2, 5, dtype=torch.bool))


def test_torchtune_tolerance_that_cannot_fail() -> None:
    """Its test of the PPO loss compared with rtol = 1e6, so any sign passed. Here a flipped sign is found."""
    new, old, a = torch.tensor([[0.1]]), torch.tensor([[0.0]]), torch.tensor([[1.0]])
    loss = float(policy_gradient.ppo(new, old, a, torch.ones(1, 1, dtype=torch.bool)).loss)
    assert loss == pytest.approx(-math.exp(0.1), rel=1e-6) and loss != pytest.approx(math.exp(0.1), rel=1e-6)


def test_equal_rewards_in_a_group_give_no_noise() -> None:
    """Rewards that are equal up to rounding were divided by a deviation of 1e-8."""
    rewards = torch.full((1, 3), 0.1) + torch.tensor([[0.0, 7e-9, -7e-9]])
    assert advantages.group_relative(rewards).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_rewards_that_are_not_finite_are_named(bad: float) -> None:
    for call in (
        lambda: advantages.rloo(torch.tensor([[1.0, bad]])),
        lambda: advantages.group_relative(torch.tensor([[1.0, bad]])),
        lambda: advantages.less_mean(torch.tensor([1.0, bad])),
    ):
        with pytest.raises(UserError, match="rewards.*1.* is (nan|inf)"):
            call()
    with pytest.raises(UserError, match="scores\\[0\\]"):
        advantages.token_rewards(
            torch.tensor([bad]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.1
        )


def test_one_sample_a_prompt_has_no_group() -> None:
    for function in (advantages.rloo, advantages.group_relative):
        with pytest.raises(ValueError, match="at least 2 samples"):
            function(torch.ones(4, 1))
    with pytest.raises(ValueError, match="K at least 2"):
        reward.ranked(torch.ones(4, 1), torch.zeros(4, 1))


def test_an_empty_response_is_named() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="sequences \\[1\\] have no response token"):
        advantages.token_rewards(torch.zeros(2), torch.zeros(2, 2), mask, 0.1)
    with pytest.raises(ValueError, match="answers \\[1\\] have no token"):
        preference.answer_logprobs(torch.zeros(2, 2), mask)


def test_a_float_mask_is_refused() -> None:
    """Weights in a mask counted as tokens in one place and as weights in another."""
    for call in (
        lambda m: aggregation.aggregate(torch.ones(1, 2), m),
        lambda m: policy_gradient.ppo(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2), m),
        lambda m: values.value_loss(torch.ones(1, 2), torch.ones(1, 2), m),
    ):
        with pytest.raises(TypeError, match="expected torch.bool"):
            call(torch.ones(1, 2))
