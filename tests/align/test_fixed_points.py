"""Where each method ends when every expectation is exact: on enumerated bandits, by gradient descent on the losses.

Reward less beta KL has its optimum at ``reference exp(score / beta) / Z``. Methods that do not maximise that are held
to the fixed point that they do have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gptcore.align import decision_process as dp
from gptcore.align.losses import advantages, kl, policy_gradient, preference
from gptcore.stats import best_of_n

SCORES = torch.tensor([1.0, 0.2, -0.6], dtype=torch.float64)
REFERENCE = torch.tensor([0.15, 0.55, 0.3], dtype=torch.float64)
BETA = 0.5
WITHIN = 0.01  # total variation


def tilted(beta: float = BETA) -> torch.Tensor:
    return (REFERENCE.log() + SCORES / beta).softmax(-1)


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """Total variation."""
    return 0.5 * float((p - q).abs().sum())


def descend(
    gradient_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *, steps: int = 400, epochs: int = 1
) -> torch.Tensor:
    """The policy (A,) after gradient descent from the reference; the loss sees logits and the sampling policy."""
    logits = REFERENCE.log().clone().requires_grad_()
    rate = 1.0
    for step in range(steps):
        old = logits.detach().log_softmax(-1)
        for _ in range(epochs):
            (slope,) = torch.autograd.grad(gradient_of(logits.log_softmax(-1), old), logits)
            with torch.no_grad():
                logits -= rate * (1 - step / steps) * slope
    return logits.detach().softmax(-1)


def groups(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every group of ``size`` samples up to order: arms (P, size), and how many orders each has (P,)."""
    arms = list(itertools.combinations_with_replacement(range(len(SCORES)), size))
    orders = [
        math.factorial(size) / math.prod(math.factorial(group.count(a)) for a in set(group)) for group in arms
    ]
    return torch.tensor(arms), torch.tensor(orders, dtype=torch.float64)


def grpo_loss(
    size: int, *, scale: bool, penalty: str
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """GRPO's expected loss, over all groups with their probability. The loss is linear in advantages and KL, so a
    group's probability may multiply them."""
    arms, orders = groups(size)
    a = advantages.group_relative(SCORES[arms], scale=scale)
    mask = torch.ones(arms.numel(), 1, dtype=torch.bool)

    def loss(logprobs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        chance = (orders * old[arms].sum(-1).exp())[:, None].expand(arms.shape).reshape(-1)
        new, before = logprobs[arms].reshape(-1, 1), old[arms].reshape(-1, 1)
        if penalty == "exact":
            divergence = kl.exact(logprobs, REFERENCE.log()).expand(arms.numel())
        else:
            divergence = kl.estimate(penalty, new, REFERENCE.log()[arms].reshape(-1, 1))[:, 0]
        return policy_gradient.grpo(
            new,
            before,
            a.reshape(-1) * chance,
            mask,
            kl=(divergence * chance)[:, None],
            beta=BETA,
            total=size,
        ).loss

    return loss


# --- reward less KL -----------------------------------------------------------------------------------------------


def test_ppo_with_kl_in_the_reward() -> None:
    mask = torch.ones(3, 1, dtype=torch.bool)

    def loss(logprobs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        rewards = advantages.token_rewards(SCORES, kl.k1(old, REFERENCE.log())[:, None], mask, BETA)
        critic = (old.exp() @ rewards).expand(3, 1)
        a = advantages.gae(rewards, critic, mask).advantages * old.exp()[:, None]
        return policy_gradient.ppo(logprobs[:, None], old[:, None], a, mask, total=1).loss

    assert distance(descend(loss, epochs=3), tilted()) <= WITHIN


def test_ppo_over_answers_of_several_tokens() -> None:
    """Two to three tokens, an end token, a critic that is exact for the reward with its KL: every answer's probability
    goes to ``reference exp(score / beta) / Z``."""
    worth = {(0, 0): 1.0, (0, 1): -1.0, (1, 0): 0.3, (1, 1): 0.6}
    process = dp.token_process(
        3, 3, lambda text, token, whole: worth.get((*text, token)[:2], -0.5) if whole else 0.0, end=2
    )
    reference = np.random.default_rng(0).dirichlet(np.full(3, 5.0), size=len(process.texts))
    optimum = dp.regularised(process.process, reference, BETA).policy
    answers = list(process.answers(reference))
    states, actions = torch.full((2, len(answers), 3), -1)
    for row, answer in enumerate(answers):
        states[row, : len(answer.states)] = torch.tensor(answer.states)
        actions[row, : len(answer.tokens)] = torch.tensor(answer.tokens)
    mask = states >= 0
    at = (states.clamp(min=0), actions.clamp(min=0))
    paid = torch.from_numpy(process.process.rewards)[at]
    scores = torch.where(mask, paid, 0.0).sum(-1)
    log_ref = torch.from_numpy(reference).log()
    logits = log_ref.clone().requires_grad_()
    for step in range(500):
        old = logits.detach().log_softmax(-1)
        rewards = advantages.token_rewards(scores, kl.k1(old, log_ref)[at], mask, BETA)
        penalised = process.process.rewards - BETA * kl.k1(old, log_ref).numpy()
        penalised = dp.DecisionProcess(process.process.transitions, penalised)
        critic = torch.from_numpy(dp.evaluate(penalised, old.exp().numpy()).values)
        a = advantages.gae(rewards, critic[at[0]], mask, lam=0.95).advantages
        chance = torch.where(mask, old[at], 0.0).sum(-1).exp()[:, None]
        for _ in range(2):
            new = logits.log_softmax(-1)[at]
            loss = policy_gradient.ppo(
                new, old[at], a * chance, mask, aggregation="sequence_sum", total=1
            ).loss
            (slope,) = torch.autograd.grad(loss, logits)
            with torch.no_grad():
                # by the chance to be in the state, so that rare states learn as fast as others
                visits = torch.zeros(len(logits), dtype=torch.float64)
                visits.index_put_((at[0][mask],), chance.expand(mask.shape)[mask], accumulate=True)
                logits -= (1 - step / 500) * slope / visits[:, None]
    learned = logits.detach().softmax(-1).numpy()
    p, q = (np.array([a.probability for a in process.answers(policy)]) for policy in (learned, optimum))
    start = np.array([a.probability for a in answers])
    assert 0.5 * np.abs(p - q).sum() <= WITHIN < 0.2 < 0.5 * np.abs(start - q).sum()


@pytest.mark.parametrize("size", [2, 4])
def test_rloo_with_kl_in_the_reward(size: int) -> None:
    arms, orders = groups(size)
    mask = torch.ones(arms.numel(), 1, dtype=torch.bool)

    def loss(logprobs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        rewards = SCORES - BETA * kl.k1(old, REFERENCE.log())
        chance = (orders * old[arms].sum(-1).exp())[:, None]
        a = (advantages.rloo(rewards[arms]) * chance).reshape(-1)
        return policy_gradient.reinforce(logprobs[arms].reshape(-1, 1), a, mask, total=size)

    assert distance(descend(loss), tilted()) <= WITHIN


@pytest.mark.parametrize("penalty", ["exact", "k2"])
def test_grpo_without_standard_deviations_in_large_groups(penalty: str) -> None:
    got = descend(grpo_loss(64, scale=False, penalty=penalty), steps=150)
    assert distance(got, tilted()) <= WITHIN


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("penalty", ["exact", "k2"])
def test_grpo_without_standard_deviations_in_small_groups(size: int, penalty: str) -> None:
    """The mean holds the sample itself, which shrinks advantages by (G - 1) / G: beta acts as if it were larger."""
    got = descend(grpo_loss(size, scale=False, penalty=penalty))
    assert distance(got, tilted(BETA * size / (size - 1))) <= WITHIN < distance(got, tilted())


def test_dpo_with_unlimited_preferences() -> None:
    """Pairs from the reference, labelled by Bradley-Terry with the scores."""
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    better, worse = torch.tensor(pairs).T
    chance = REFERENCE[better] * REFERENCE[worse] * torch.sigmoid(SCORES[better] - SCORES[worse])
    log_ref = REFERENCE.log()
    logits = log_ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logprobs = logits.log_softmax(-1)
        losses = [
            preference.dpo(logprobs[[a]], logprobs[[b]], log_ref[[a]], log_ref[[b]], beta=BETA).loss
            for a, b in pairs
        ]
        loss = (chance * torch.stack(losses)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert distance(logits.detach().softmax(-1), tilted()) <= WITHIN


# --- other fixed points -------------------------------------------------------------------------------------------


def grpo_residual(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """The expected gradient of published GRPO by the logits, written out: over ordered groups, advantages in standard
    deviations, and of k3 as a loss ``policy - reference``."""
    arms = np.array(list(itertools.product(range(3), repeat=size)))
    r = SCORES.numpy()[arms]
    deviation = r.std(1, ddof=1, keepdims=True)
    a = np.divide(r - r.mean(1, keepdims=True), deviation, out=np.zeros_like(r), where=deviation > 1e-12)
    of_arm = np.stack([(a * (arms == x)).sum(1) for x in range(3)], 1) / size
    return lambda policy: policy[arms].prod(1) @ of_arm - BETA * (policy - REFERENCE.numpy())


@pytest.mark.parametrize("size", [2, 4])
def test_grpo_as_published_has_a_fixed_point_of_its_own(size: int) -> None:
    got = descend(grpo_loss(size, scale=True, penalty="k3"))
    residual = grpo_residual(size)
    # the root of the written-out gradient, by damped iteration on the simplex
    policy = REFERENCE.numpy().copy()
    for _ in range(3000):
        policy = policy + 0.2 * residual(policy) * policy.min()
        policy = np.clip(policy, 1e-9, None) / np.clip(policy, 1e-9, None).sum()
    assert np.abs(residual(policy)).max() < 1e-6
    assert distance(got, torch.from_numpy(policy)) <= WITHIN
    assert distance(got, tilted()) > 5 * WITHIN


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_best_of_n_is_a_difference_of_powers(n: int) -> None:
    p, scores = REFERENCE.numpy(), SCORES.numpy()
    counted = np.zeros(3)
    for draws in itertools.product(range(3), repeat=n):
        counted[max(draws, key=lambda arm: scores[arm])] += p[list(draws)].prod()
    got = best_of_n.distribution(p, scores, n)
    np.testing.assert_allclose(got, counted, rtol=0, atol=1e-12)
    if n > 1:
        assert (
            min(distance(torch.from_numpy(got), tilted(beta)) for beta in np.geomspace(0.05, 20, 400)) > 0.01
        )


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_best_of_n_is_within_its_bound_of_the_policy(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(50):
        v = int(rng.integers(2, 40))
        p, scores = rng.dirichlet(np.ones(v)), rng.integers(0, 12, v).astype(float)
        best = best_of_n.distribution(p, scores, n)
        assert best.sum() == pytest.approx(1.0, abs=1e-12)
        there = best > 0
        assert (best[there] * np.log(best[there] / p[there])).sum() <= best_of_n.kl_bound(n) + 1e-12
    many = np.full(100_000, 1e-5)
    best = best_of_n.distribution(many, np.arange(100_000.0), n)
    there = best > 0
    reached = (best[there] * np.log(best[there] / many[there])).sum()
    assert reached == pytest.approx(best_of_n.kl_bound(n), abs=2e-3)


def test_expected_best_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    gold, proxy = rng.normal(size=7), rng.normal(size=7)
    for n in (1, 3, 7):
        subsets = list(itertools.combinations(range(7), n))
        truth = np.mean([gold[max(s, key=lambda i: proxy[i])] for s in subsets])
        assert best_of_n.expected_best(gold, n, by=proxy) == pytest.approx(truth, abs=1e-12)
        assert best_of_n.expected_best(gold, n) == pytest.approx(
            np.mean([gold[list(s)].max() for s in subsets])
        )
