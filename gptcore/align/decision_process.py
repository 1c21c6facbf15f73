"""Markov decision processes that are small enough to solve exactly: the oracle of advantages, critics and trainers.

A language model that answers is such a process (Puterman 1994; Ouyang et al. 2022 treat the answer as one action, GAE
needs its tokens): a state is the text so far, an action is the next token, the next state is the text with that token,
the reward of a step is what is paid after it, and the process ends after the end token or at the length limit.
:func:`token_process` writes it out, state by state. Everything is NumPy float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_LARGEST = 1 << 27  # entries of a dense transition table, 1 GiB


@dataclass(frozen=True)
class DecisionProcess:
    """S states, A actions.

    transitions: (S, A, S) probabilities of the next state; what a row lacks to 1 is the probability that the process
        ends there, so that an end is no state. rewards: (S, A), expected. gamma: discount in [0, 1].

    Raises ValueError where shapes, probabilities or discount are none.
    """

    transitions: Array
    rewards: Array
    gamma: float = 1.0

    def __post_init__(self) -> None:
        states, actions = self.rewards.shape
        if self.transitions.shape != (states, actions, states):
            raise ValueError(
                f"DecisionProcess: transitions has shape {self.transitions.shape}, "
                f"expected {(states, actions, states)} for rewards of {self.rewards.shape}"
            )
        leaving = self.transitions.sum(-1)
        if self.transitions.min(initial=0.0) < 0 or leaving.max(initial=0.0) > 1 + 1e-12:
            raise ValueError("DecisionProcess: transitions must be at least 0, each row's sum at most 1")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"DecisionProcess: gamma is {self.gamma}, expected one in [0, 1]")

    def action_values(self, values: Array) -> Array:
        """(S, A): ``r(s, a) + gamma E V(s')``, one step of Bellman's equation."""
        return np.asarray(self.rewards + self.gamma * self.transitions @ values)


class Solution(NamedTuple):
    """Values (S,), action values (S, A) and the policy (S, A) that has them."""

    values: Array
    action_values: Array
    policy: Array

    @property
    def advantages(self) -> Array:
        """(S, A): action values less values."""
        return self.action_values - self.values[:, None]


def evaluate(process: DecisionProcess, policy: ArrayLike) -> Solution:
    """The values of ``policy`` (S, A), by solving Bellman's equation as the linear system it is.

    Raises:
        ValueError: a policy that is not a distribution over actions, or one under which the process need not end while
            nothing is discounted.
    """
    policy = _policy(process, policy)
    chain = np.einsum("sa,sat->st", policy, process.transitions)
    rewards = (policy * process.rewards).sum(-1)
    try:
        values = np.linalg.solve(np.eye(len(chain)) - process.gamma * chain, rewards)
    except np.linalg.LinAlgError as error:
        raise ValueError("evaluate: the process need not end under this policy, and gamma is 1") from error
    return Solution(values, process.action_values(values), policy)


def value_iteration(process: DecisionProcess, *, tolerance: float = 1e-12, sweeps: int = 100_000) -> Solution:
    """The optimal values, by ``V <- max_a Q`` until no value moves by more than ``tolerance``; ties share the policy.

    Raises RuntimeError where that takes more than ``sweeps``.
    """
    return _iterate(process, lambda q: q.max(-1), _greedy, tolerance, sweeps)


def policy_iteration(process: DecisionProcess) -> Solution:
    """The optimal values, by evaluating the greedy policy until it is its own (Howard 1960)."""
    states, actions = process.rewards.shape
    choice = np.zeros(states, dtype=np.int64)
    while True:
        solved = evaluate(process, np.eye(actions)[choice])
        best = solved.action_values.max(-1)
        # a switch only where it gains: between ties it would go round for ever
        gains = best > solved.values + 1e-12 * (1 + np.abs(best))
        if not gains.any():
            return solved
        choice = np.where(gains, solved.action_values.argmax(-1), choice)


def regularised(
    process: DecisionProcess,
    reference: ArrayLike,
    beta: float,
    *,
    tolerance: float = 1e-12,
    sweeps: int = 100_000,
) -> Solution:
    """The optimum of reward less ``beta KL(policy || reference)``, which is what RLHF maximises.

    ``V = beta log sum_a reference exp(Q / beta)`` and ``policy = reference exp((Q - V) / beta)``. In a token process
    answers then have probability proportional to ``reference exp(score / beta)``. ``values`` count the penalty.
    """
    reference = _policy(process, reference)
    if not beta > 0:
        raise ValueError(f"regularised: beta is {beta}, expected a positive number")

    def soft(q: Array) -> Array:
        top = q.max(-1, keepdims=True)
        inner = (reference * np.exp((q - top) / beta)).sum(-1)
        return np.asarray(top[:, 0] + beta * np.log(inner))

    def improved(q: Array) -> Array:
        return np.asarray(reference * np.exp((q - soft(q)[:, None]) / beta))

    return _iterate(process, soft, improved, tolerance, sweeps)


def expected_gae(process: DecisionProcess, policy: ArrayLike, values: ArrayLike, lam: float) -> Array:
    """(S, A): what generalised advantage estimation gives on average, from ``values`` (S,) that need not be right.

    ``A(s, a) = delta(s, a) + gamma lam E A(s', a')``, solved as a linear system. With the policy's own values its mean
    over the policy's actions is 0 in every state, for every ``lam``.
    """
    policy, values = _policy(process, policy), np.asarray(values, dtype=np.float64)
    deltas = process.action_values(values) - values[:, None]
    chain = np.einsum("sa,sat->st", policy, process.transitions)
    means = np.linalg.solve(np.eye(len(chain)) - process.gamma * lam * chain, (policy * deltas).sum(-1))
    return np.asarray(deltas + process.gamma * lam * process.transitions @ means)


class Answer(NamedTuple):
    """A whole answer of a token process: its tokens, the states they were chosen in, and its probability."""

    tokens: tuple[int, ...]
    states: tuple[int, ...]
    probability: float


@dataclass(frozen=True)
class TokenProcess:
    """The decision process of answering: ``texts[s]`` is the text of state s, the empty one first."""

    process: DecisionProcess
    texts: tuple[tuple[int, ...], ...]
    end: int | None
    length: int

    def answers(self, policy: ArrayLike) -> Iterator[Answer]:
        """Every answer that can be given, with its probability under ``policy`` (S, A)."""
        policy = _policy(self.process, policy)
        index = {text: state for state, text in enumerate(self.texts)}
        for tokens in _answers(policy.shape[1], self.length, self.end):
            states = tuple(index[tokens[:t]] for t in range(len(tokens)))
            yield Answer(tokens, states, float(np.prod(policy[list(states), list(tokens)])))


def token_process(
    vocabulary: int,
    length: int,
    reward: Callable[[tuple[int, ...], int, bool], float],
    *,
    end: int | None = None,
    gamma: float = 1.0,
) -> TokenProcess:
    """The decision process of answering with at most ``length`` tokens of a vocabulary of ``vocabulary``.

    Args:
        reward: (text so far, next token, whether the answer is whole with it) to what is paid for that token.
        end: the token that ends an answer; None: all have ``length`` tokens.

    Raises:
        ValueError: no tokens, or more states than a dense table holds.
    """
    if vocabulary < 1 or length < 1 or (end is not None and not 0 <= end < vocabulary):
        raise ValueError(
            f"token_process: vocabulary {vocabulary}, length {length}, end {end} make no process"
        )
    going_on = [token for token in range(vocabulary) if token != end]
    size = sum(len(going_on) ** t for t in range(length))
    if size * size * vocabulary > _LARGEST:
        raise ValueError(f"token_process: {size} states are too many to write out")
    texts = tuple(text for t in range(length) for text in itertools.product(going_on, repeat=t))
    index = {text: state for state, text in enumerate(texts)}
    transitions = np.zeros((len(texts), vocabulary, len(texts)))
    rewards = np.zeros((len(texts), vocabulary))
    for state, text in enumerate(texts):
        for token in range(vocabulary):
            whole = token == end or len(text) + 1 == length
            rewards[state, token] = reward(text, token, whole)
            if not whole:
                transitions[state, token, index[(*text, token)]] = 1.0
    return TokenProcess(DecisionProcess(transitions, rewards, gamma), texts, end, length)


def _answers(vocabulary: int, length: int, end: int | None) -> Iterator[tuple[int, ...]]:
    going_on = [token for token in range(vocabulary) if token != end]
    if end is not None:
        for t in range(length - 1):
            yield from ((*text, end) for text in itertools.product(going_on, repeat=t))
    for text in itertools.product(going_on, repeat=length - 1):
        yield from ((*text, token) for token in range(vocabulary))


def _policy(process: DecisionProcess, policy: ArrayLike) -> Array:
    policy = np.asarray(policy, dtype=np.float64)
    if policy.shape != process.rewards.shape:
        raise ValueError(f"policy has shape {policy.shape}, expected {process.rewards.shape}")
    # a softmax in f32 sums to 1 within its rounding; what it lacks would count as ending
    if policy.min() < 0 or not np.allclose(policy.sum(-1), 1.0, rtol=0, atol=1e-5):
        raise ValueError("policy must be at least 0 and sum to 1 over the actions of each state")
    return np.asarray(policy / policy.sum(-1, keepdims=True))


def _greedy(q: Array) -> Array:
    best = q >= q.max(-1, keepdims=True) - 1e-12 * (1 + np.abs(q.max(-1, keepdims=True)))
    return np.asarray(best / best.sum(-1, keepdims=True))


def _iterate(
    process: DecisionProcess,
    backup: Callable[[Array], Array],
    improved: Callable[[Array], Array],
    tolerance: float,
    sweeps: int,
) -> Solution:
    values = np.zeros(len(process.rewards))
    for _ in range(sweeps):
        q = process.action_values(values)
        before, values = values, backup(q)
        if np.abs(values - before).max(initial=0.0) <= tolerance:
            return Solution(values, q, improved(q))
    raise RuntimeError(
        f"no fixed point after {sweeps} sweeps: the process need not end, and gamma is {process.gamma}"
    )
