"""What losses and advantages are where pen and paper give the answer: 1e-6 in f32, 1e-10 in float64, both relative."""

from __future__ import annotations

import math

import pytest
import torch

from gptcore.align.losses import advantages, kl, policy_gradient, preference, reward, supervised, values

BOUND = {torch.float32: 1e-6, torch.float64: 1e-10}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def agree(got: torch.Tensor, expected: torch.Tensor | float, dtype: torch.dtype) -> None:
    """Within the bound of the largest magnitude, in ``dtype``."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert got.dtype == dtype, f"computed in {got.dtype}"
    error = (got.detach().double() - expected).abs().max().item()
    assert error <= BOUND[dtype] * max(1e-300, expected.abs().max().item()), (got, expected)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).mul(scale).to(dtype)


def holes(*shape: int) -> torch.Tensor:
    """A mask with padding left and right and gaps, at least one True in each row."""
    mask = torch.rand(*shape) < 0.6
    mask[:, shape[1] // 2] = True
    return mask


# --- preferences --------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_dpo_at_the_reference_is_ln_2(dtype: torch.dtype, beta: float) -> None:
    chosen, rejected = draw(7, dtype=dtype, scale=30), draw(7, dtype=dtype, scale=30)
    agree(preference.dpo(chosen, rejected, chosen, rejected, beta=beta).loss, math.log(2), dtype)


@dtypes
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_conservative_dpo_at_the_reference_is_ln_2_and_its_optimum_is_the_log_odds(
    dtype: torch.dtype, smoothing: float
) -> None:
    zero = torch.zeros(3, dtype=dtype)
    agree(preference.dpo(zero, zero, zero, zero, label_smoothing=smoothing).loss, math.log(2), dtype)
    if smoothing:
        h = torch.tensor([math.log((1 - smoothing) / smoothing)], dtype=dtype, requires_grad=True)
        zero = torch.zeros(1, dtype=dtype)
        preference.dpo(h, zero, zero, zero, beta=1.0, label_smoothing=smoothing).loss.backward()
        assert h.grad is not None and abs(float(h.grad)) <= BOUND[dtype]


@dtypes
@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_ipo_at_the_reference_is_a_quarter_of_beta_to_the_minus_two(dtype: torch.dtype, beta: float) -> None:
    chosen, rejected = draw(7, dtype=dtype), draw(7, dtype=dtype)
    agree(preference.ipo(chosen, rejected, chosen, rejected, beta=beta).loss, 1 / (4 * beta**2), dtype)


@dtypes
def test_ipo_has_its_minimum_at_half_the_inverse_of_beta(dtype: torch.dtype) -> None:
    h = torch.tensor([1 / (2 * 0.25)], dtype=dtype)
    zero = torch.zeros(1, dtype=dtype)
    assert float(preference.ipo(h, zero, zero, zero, beta=0.25).loss) == 0.0


@dtypes
@pytest.mark.parametrize(
    ("weights", "expected"), [((1.0, 1.0), 0.5), ((1.5, 0.5), 0.5 * (4 * 1.5 + 2 * 0.5) / 6)]
)
def test_kto_at_the_reference_is_half_the_weight(
    dtype: torch.dtype, weights: tuple[float, float], expected: float
) -> None:
    logprobs = draw(6, dtype=dtype, scale=20)
    desirable = torch.tensor([True, True, False, True, False, True])
    got = preference.kto(
        logprobs, logprobs, desirable, 0.0, desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    agree(got.loss, expected, dtype)


@dtypes
def test_kto_reference_point_is_the_mean_log_ratio_and_not_below_0(dtype: torch.dtype) -> None:
    reference = draw(6, dtype=dtype)
    agree(preference.kto_reference_point(reference + 0.5, reference) + 1, 1.5, dtype)
    assert float(preference.kto_reference_point(reference - 0.5, reference)) == 0.0


@dtypes
def test_simpo_at_equal_averages_is_the_log_sigmoid_of_minus_gamma(dtype: torch.dtype) -> None:
    average = draw(5, dtype=dtype)
    got = preference.simpo(average, average, beta=2.0, gamma=0.7).loss
    agree(got, math.log1p(math.exp(0.7)), dtype)


@dtypes
def test_orpo_at_equal_averages_adds_beta_ln_2(dtype: torch.dtype) -> None:
    average = -draw(5, dtype=dtype).abs() - 0.01
    nll = torch.tensor(1.25, dtype=dtype)
    agree(preference.orpo(average, average, nll, beta=0.2).loss, 1.25 + 0.2 * math.log(2), dtype)


def test_orpo_log_odds_keep_their_digits_near_certainty() -> None:
    # p = 1 - 1e-9: log odds are ln(1e9 - 1), which 1 - p in float64 would give to nine digits fewer
    chosen = torch.tensor([math.log1p(-1e-9)], dtype=torch.float64)
    rejected = torch.tensor([math.log(0.5)], dtype=torch.float64)
    got = preference.orpo(chosen, rejected, torch.zeros((), dtype=torch.float64), beta=1.0).loss
    agree(got, math.log1p(1 / (1e9 - 1)), torch.float64)


# --- reward models ------------------------------------------------------------------------------------------------


@dtypes
def test_pairwise_reward_loss_at_equal_scores_is_ln_2(dtype: torch.dtype) -> None:
    scores = draw(6, dtype=dtype)
    agree(reward.pairwise(scores, scores).loss, math.log(2), dtype)


@dtypes
@pytest.mark.parametrize("k", [2, 3, 4, 9])
@pytest.mark.parametrize("ties", ["half", "skip"])
def test_ranked_reward_loss_at_equal_scores_is_ln_2_for_every_k(
    dtype: torch.dtype, k: int, ties: str
) -> None:
    scores = draw(4, 1, dtype=dtype).expand(4, k)
    ranks = torch.arange(k).expand(4, k).clone()
    ranks[:, -1] = ranks[:, -2] if k > 2 else 1
    agree(reward.ranked(scores, ranks, ties=ties).loss, math.log(2), dtype)


@dtypes
def test_ranked_with_two_answers_is_pairwise(dtype: torch.dtype) -> None:
    scores = draw(8, 2, dtype=dtype)
    ranks = torch.tensor([[0, 1], [1, 0]] * 4)
    chosen, rejected = scores.gather(1, ranks.argsort(1)).unbind(1)
    options = {"margin": 0.3, "centring": 0.01}
    agree(
        reward.ranked(scores, ranks, **options).loss,
        reward.pairwise(chosen, rejected, **options).loss.double(),
        dtype,
    )


@dtypes
def test_margin_moves_the_pairwise_loss_along_its_curve(dtype: torch.dtype) -> None:
    agree(
        reward.pairwise(torch.tensor([1.5], dtype=dtype), torch.tensor([0.25], dtype=dtype), margin=1.25).loss,
        math.log(2), dtype,
    )  # fmt: skip


# --- policy gradients ---------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_ppo_before_the_first_update(dtype: torch.dtype, aggregation: str) -> None:
    logprobs, a, mask = -draw(4, 9, dtype=dtype).abs(), draw(4, 9, dtype=dtype), holes(4, 9)
    got = policy_gradient.ppo(logprobs, logprobs, a, mask, aggregation=aggregation)
    assert float(got.ratio) == 1.0 and float(got.clip_share) == 0.0 and float(got.approx_kl) == 0.0
    rows = [row[m].double() for row, m in zip(a, mask, strict=True)]
    means = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
        "sequence_sum": torch.stack([row.sum() for row in rows]).mean(),
    }
    scale = float(a.abs().max())
    assert abs(float(got.loss) + float(means[aggregation])) <= BOUND[dtype] * scale * 9


@dtypes
def test_ppo_before_the_first_update_has_the_gradient_of_reinforce(dtype: torch.dtype) -> None:
    old, a, mask = -draw(4, 9, dtype=dtype).abs(), draw(4, 9, dtype=dtype), holes(4, 9)
    gradients = []
    for loss in (
        lambda x: policy_gradient.ppo(x, old, a, mask).loss,
        lambda x: policy_gradient.surrogate(x, old, a, mask),
        lambda x: policy_gradient.reinforce(x, a, mask, aggregation="token_mean"),
    ):
        new = old.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(new), new)[0])
    agree(gradients[0], gradients[2].double(), dtype)
    agree(gradients[1], gradients[2].double(), dtype)


@dtypes
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, -2.4, 0.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.5, -2.0, 1.6, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_ppo_clip_at_each_side(
    dtype: torch.dtype, ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    new = torch.tensor([[math.log(ratio)]], dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    got = policy_gradient.ppo(
        new, torch.zeros(1, 1, dtype=dtype), torch.tensor([[advantage]], dtype=dtype), mask
    )
    agree(got.loss, loss, dtype)
    agree(torch.autograd.grad(got.loss, new)[0] + 1, gradient + 1, dtype)
    assert float(got.clip_share) == float(gradient == 0.0)


def test_dual_clip_bounds_the_loss_of_bad_actions() -> None:
    new = torch.tensor([[math.log(50.0)]], dtype=torch.float64)
    mask, a = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[-2.0]], dtype=torch.float64)
    old = torch.zeros(1, 1, dtype=torch.float64)
    agree(policy_gradient.ppo(new, old, a, mask).loss, 100.0, torch.float64)
    agree(policy_gradient.ppo(new, old, a, mask, dual_clip=3.0).loss, 6.0, torch.float64)


@dtypes
def test_value_loss_takes_the_worse_of_clipped_and_not(dtype: torch.dtype) -> None:
    # 0.5 * max((1 - 2)^2, (0.2 - 2)^2) = 1.62, and 0.5 * max((-1 - 2)^2, (-0.2 - 2)^2) = 4.5
    new = torch.tensor([[1.0, -1.0]], dtype=dtype)
    got = values.value_loss(
        new, torch.full_like(new, 2.0), torch.ones(1, 2, dtype=torch.bool), old_values=torch.zeros_like(new)
    )
    agree(got.loss, (1.62 + 4.5) / 2, dtype)
    assert float(got.clip_share) == 0.5


@dtypes
def test_perfect_values_explain_all_the_variance(dtype: torch.dtype) -> None:
    returns, mask = draw(3, 5, dtype=dtype), holes(3, 5)
    got = values.value_loss(returns, returns, mask)
    assert float(got.loss) == 0.0 and float(got.explained_variance) == 1.0


# --- advantages ---------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_with_lambda_1_is_reward_to_go_less_value(dtype: torch.dtype, gamma: float) -> None:
    rewards, v = draw(3, 12, dtype=dtype), draw(3, 12, dtype=dtype)
    got = advantages.gae(rewards, v, torch.ones(3, 12, dtype=torch.bool), gamma=gamma, lam=1.0).advantages
    expected = torch.zeros(3, 12, dtype=torch.float64)
    for t in range(12):
        expected[:, t] = (
            sum(gamma ** (s - t) * rewards[:, s].double() for s in range(t, 12)) - v[:, t].double()
        )
    agree(got, expected, dtype)


@dtypes
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_with_lambda_0_is_the_error_of_one_step(dtype: torch.dtype, gamma: float) -> None:
    rewards, v = draw(3, 12, dtype=dtype), draw(3, 12, dtype=dtype)
    got = advantages.gae(rewards, v, torch.ones(3, 12, dtype=torch.bool), gamma=gamma, lam=0.0)
    following = torch.cat([v[:, 1:], torch.zeros(3, 1, dtype=dtype)], 1).double()
    agree(got.advantages, rewards.double() + gamma * following - v.double(), dtype)
    agree(got.returns, rewards.double() + gamma * following, dtype)


@dtypes
def test_whitened_values_have_mean_0_and_variance_1_and_rewards_keep_their_mean(dtype: torch.dtype) -> None:
    x, mask = draw(5, 8, dtype=dtype) * 3 + 10, holes(5, 8)
    white = advantages.whiten(x, mask)[mask].double()
    assert abs(float(white.mean())) <= 20 * BOUND[dtype]
    agree(white.var().to(dtype), 1 / (1 + 1e-8 / float(x[mask].double().var())), dtype)
    agree(advantages.whiten(x, mask, shift_mean=False)[mask].mean(), x[mask].double().mean(), dtype)


@dtypes
def test_rloo_of_two_samples_is_plus_and_minus_their_difference(dtype: torch.dtype) -> None:
    rewards = draw(6, 2, dtype=dtype)
    difference = (rewards[:, 0] - rewards[:, 1]).double()
    agree(advantages.rloo(rewards), torch.stack([difference, -difference], 1), dtype)


@dtypes
def test_grpo_of_two_samples_is_plus_and_minus_one_over_root_2(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[3.0, 1.0], [-0.5, 0.25]], dtype=dtype)
    root = 1 / math.sqrt(2)
    agree(
        advantages.group_relative(rewards),
        torch.tensor([[root, -root], [-root, root]], dtype=torch.float64),
        dtype,
    )


@dtypes
def test_token_rewards_put_the_score_on_the_last_response_token(dtype: torch.dtype) -> None:
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    divergence = torch.full((2, 4), 0.5, dtype=dtype)
    got = advantages.token_rewards(torch.tensor([2.0, -1.0], dtype=dtype), divergence, mask, 0.1)
    expected = [[0, -0.05, 1.95, 0], [-0.05, -0.05, -0.05, -1.05]]
    agree(got, torch.tensor(expected, dtype=torch.float64), dtype)


# --- divergence ---------------------------------------------------------------------------------------------------


@dtypes
def test_estimators_of_kl_over_an_enumerated_vocabulary(dtype: torch.dtype) -> None:
    logits, ref_logits = draw(50, 11, dtype=dtype), draw(50, 11, dtype=dtype)
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    exact = kl.exact(logits, ref_logits)
    agree(exact, (log_p.double().exp() * (log_p.double() - log_q.double())).sum(-1), dtype)
    p = log_p.double().exp()
    for unbiased in ("k1", "k3"):
        each = kl.estimate(unbiased, log_p, log_q)
        agree((p * each.double()).sum(-1).to(dtype), exact.double(), dtype)
    for never_negative in ("k2", "k3"):
        assert float(kl.estimate(never_negative, log_p, log_q).min()) >= 0.0


def test_k3_is_not_negative_next_to_zero() -> None:
    d = torch.linspace(-1e-3, 1e-3, 4001)
    k3 = kl.k3(d, torch.zeros_like(d))
    assert float(k3.min()) >= 0.0 and float((torch.exp(-d) - 1 + d).min()) < 0.0  # which the plain form is
    torch.testing.assert_close(k3.double(), d.double().square() / 2, rtol=1e-3, atol=1e-7)


def test_gradients_of_the_estimators_as_losses() -> None:
    """In expectation over the vocabulary: k1 has none, k2 that of KL(p || q), k3 that of KL(q || p)."""
    logits = draw(7, dtype=torch.float64).requires_grad_()
    log_q = draw(7, dtype=torch.float64).log_softmax(-1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    log_p = logits.log_softmax(-1)
    p = log_p.detach().exp()
    reverse = gradient(kl.exact(logits, log_q))
    forward = gradient(kl.exact(log_q, logits))
    agree(gradient((p * kl.k1(log_p, log_q)).sum()) + 1, torch.ones(7), torch.float64)
    agree(gradient((p * kl.k2(log_p, log_q)).sum()), reverse, torch.float64)
    agree(gradient((p * kl.k3(log_p, log_q)).sum()), forward, torch.float64)


@pytest.mark.parametrize(("measured", "factor"), [(6.0, 1.0), (12.0, 1.002), (0.0, 0.998), (6.6, 1.001)])
def test_adaptive_coefficient(measured: float, factor: float) -> None:
    assert kl.adapted(0.5, measured, target=6.0, episodes=100) == pytest.approx(0.5 * factor, rel=1e-12)


# --- the rest -----------------------------------------------------------------------------------------------------


@dtypes
def test_nll_of_a_uniform_model_is_the_log_of_its_vocabulary(dtype: torch.dtype) -> None:
    logprobs = torch.full((3, 6), -math.log(50), dtype=dtype)
    agree(supervised.nll(logprobs, holes(3, 6)), math.log(50), dtype)
    agree(supervised.nll(logprobs, holes(3, 6), weights=torch.full((3,), 2.0)), 2 * math.log(50), dtype)
