"""Exact Bellman solutions against each other, against enumeration, and as oracle of GAE."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gptcore.align import decision_process as dp
from gptcore.align.losses import advantages

RNG = np.random.default_rng


def random_process(seed: int, *, states: int = 6, actions: int = 3, gamma: float = 0.9) -> dp.DecisionProcess:
    rng = RNG(seed)
    # a tenth of every row is the probability to end
    transitions = 0.9 * rng.dirichlet(np.ones(states), size=(states, actions))
    return dp.DecisionProcess(transitions, rng.normal(size=(states, actions)), gamma)


def random_policy(seed: int, process: dp.DecisionProcess) -> np.ndarray:
    return RNG(seed).dirichlet(np.ones(process.rewards.shape[1]), size=process.rewards.shape[0])


def tokens(seed: int, *, gamma: float = 1.0, length: int = 4) -> dp.TokenProcess:
    """Three tokens, the last of which ends; random rewards after each token."""
    paid = RNG(seed).normal(size=1000)
    table: dict[tuple[int, ...], float] = {}

    def reward(text: tuple[int, ...], token: int, _: bool) -> float:
        return table.setdefault((*text, token), float(paid[len(table)]))

    return dp.token_process(3, length, reward, end=2, gamma=gamma)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_value_iteration_policy_iteration_and_enumerated_policies_agree(gamma: float) -> None:
    process = random_process(0, states=4, gamma=gamma)
    by_values, by_policies = dp.value_iteration(process), dp.policy_iteration(process)
    best = max(
        (
            dp.evaluate(process, np.eye(3)[list(choice)]).values
            for choice in itertools.product(range(3), repeat=4)
        ),
        key=lambda values: float(values.sum()),
    )
    np.testing.assert_allclose(by_values.values, best, rtol=0, atol=1e-10)
    np.testing.assert_allclose(by_policies.values, best, rtol=0, atol=1e-10)
    np.testing.assert_allclose(by_values.policy, by_policies.policy, rtol=0, atol=1e-10)


def test_evaluation_satisfies_bellman_and_advantages_average_to_nothing() -> None:
    process = random_process(1)
    policy = random_policy(2, process)
    solved = dp.evaluate(process, policy)
    np.testing.assert_allclose(solved.values, (policy * solved.action_values).sum(-1), rtol=0, atol=1e-12)
    np.testing.assert_allclose((policy * solved.advantages).sum(-1), 0.0, rtol=0, atol=1e-12)


def test_a_token_process_counts_its_states_and_answers() -> None:
    process = tokens(3)
    assert len(process.texts) == 1 + 2 + 4 + 8 and process.texts[0] == ()
    policy = random_policy(4, process.process)
    answers = list(process.answers(policy))
    # end at once, after 1, after 2, and 8 texts of three tokens with any fourth
    assert len(answers) == 1 + 2 + 4 + 8 * 3 == len({answer.tokens for answer in answers})
    assert sum(answer.probability for answer in answers) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_values_are_the_mean_over_all_answers(gamma: float) -> None:
    process = tokens(5, gamma=gamma)
    policy = random_policy(6, process.process)
    mean = 0.0
    for answer in process.answers(policy):
        rewards = process.process.rewards[list(answer.states), list(answer.tokens)]
        mean += answer.probability * float(rewards @ gamma ** np.arange(len(rewards)))
    assert dp.evaluate(process.process, policy).values[0] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_regularised_optimum_tilts_answers_by_their_score(beta: float) -> None:
    process = tokens(7)
    reference = random_policy(8, process.process)
    best = dp.regularised(process.process, reference, beta)
    before = {answer.tokens: answer for answer in process.answers(reference)}
    scores = {
        text: sum(process.process.rewards[s, a] for s, a in zip(answer.states, answer.tokens, strict=True))
        for text, answer in before.items()
    }
    tilted = {text: answer.probability * np.exp(scores[text] / beta) for text, answer in before.items()}
    z = sum(tilted.values())
    for answer in process.answers(best.policy):
        assert answer.probability == pytest.approx(tilted[answer.tokens] / z, abs=1e-12)
    assert best.values[0] == pytest.approx(beta * np.log(z), abs=1e-10)


def batch(process: dp.TokenProcess, policy: np.ndarray, values: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Every answer as a row: rewards, values and mask (B, T), states and actions, probabilities."""
    answers = list(process.answers(policy))
    rewards, state_values = torch.full((2, len(answers), process.length), float("nan"), dtype=torch.float64)
    states, actions = torch.full((2, len(answers), process.length), -1)
    for row, answer in enumerate(answers):
        n = len(answer.tokens)
        states[row, :n], actions[row, :n] = torch.tensor(answer.states), torch.tensor(answer.tokens)
        rewards[row, :n] = torch.from_numpy(process.process.rewards[list(answer.states), list(answer.tokens)])
        state_values[row, :n] = torch.from_numpy(values[list(answer.states)])
    return (
        rewards,
        state_values,
        states >= 0,
        states,
        actions,
        torch.tensor([a.probability for a in answers], dtype=torch.float64),
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("exact", [True, False], ids=["exact values", "wrong values"])
def test_gae_averages_to_what_bellman_says(gamma: float, lam: float, exact: bool) -> None:
    """Over all answers, weighted by probability, GAE is in each state and action what the linear system gives; with
    exact values that is the policy's advantage, for every lambda, and averages to 0 in each state."""
    process = tokens(9, gamma=gamma)
    policy = random_policy(10, process.process)
    solved = dp.evaluate(process.process, policy)
    values = solved.values if exact else RNG(11).normal(size=solved.values.shape)
    rewards, state_values, mask, states, actions, probability = batch(process, policy, values)
    got = advantages.gae(rewards, state_values, mask, gamma=gamma, lam=lam).advantages
    weight = probability[:, None].expand(mask.shape)[mask].numpy()
    place = (states[mask].numpy(), actions[mask].numpy())
    total, visits = np.zeros(policy.shape), np.zeros(policy.shape)
    np.add.at(total, place, weight * got[mask].numpy())
    np.add.at(visits, place, weight)
    mean = total / visits
    np.testing.assert_allclose(
        mean, dp.expected_gae(process.process, policy, values, lam), rtol=0, atol=1e-10
    )
    if exact:
        np.testing.assert_allclose(mean, solved.advantages, rtol=0, atol=1e-10)
        np.testing.assert_allclose((policy * mean).sum(-1), 0.0, rtol=0, atol=1e-10)


def test_lambda_1_is_monte_carlo_whatever_the_critic_says_and_lambda_0_is_not() -> None:
    process = tokens(12)
    policy = random_policy(13, process.process)
    solved = dp.evaluate(process.process, policy)
    wrong = solved.values + RNG(14).normal(size=solved.values.shape)
    right = solved.action_values - wrong[:, None]
    np.testing.assert_allclose(
        dp.expected_gae(process.process, policy, wrong, 1.0), right, rtol=0, atol=1e-12
    )
    assert np.abs(dp.expected_gae(process.process, policy, wrong, 0.0) - right).max() > 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: dp.DecisionProcess(p.transitions[:, :2], p.rewards), "transitions has shape"),
        (lambda p: dp.DecisionProcess(p.transitions * 2, p.rewards), "each row's sum at most 1"),
        (lambda p: dp.DecisionProcess(p.transitions, p.rewards, 1.5), "gamma is 1.5"),
        (lambda p: dp.evaluate(p, np.full((6, 3), 0.5)), "sum to 1"),
        (lambda p: dp.evaluate(p, np.ones((2, 3))), "expected \\(6, 3\\)"),
        (lambda p: dp.regularised(p, np.full((6, 3), 1 / 3), 0.0), "beta is 0.0"),
        (lambda p: dp.token_process(50, 6, lambda *_: 0.0), "too many"),
        (lambda p: dp.token_process(2, 3, lambda *_: 0.0, end=2), "make no process"),
    ],
)  # fmt: skip
def test_bad_processes_are_named(change, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        change(random_process(15))


def test_a_process_that_never_ends_is_named() -> None:
    for_ever = dp.DecisionProcess(np.ones((1, 1, 1)), np.ones((1, 1)))
    with pytest.raises(ValueError, match="need not end"):
        dp.evaluate(for_ever, [[1.0]])
    with pytest.raises(RuntimeError, match="need not end"):
        dp.value_iteration(for_ever, sweeps=100)
