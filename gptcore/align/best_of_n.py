"""The best of n samples by a reward: the simplest policy improvement, and the yardstick of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptcore.align.answers import Answer, Prompts, Reward, rewarded
from gptcore.errors import UserError
from gptcore.infer import SamplingParams, rollout
from gptcore.models import GPT


class BestOfN(NamedTuple):
    """Of P prompts: ``best`` (P,) the answers chosen; ``scores`` (P, n) of all samples; ``gold`` (P, n) or None."""

    best: list[Answer]
    scores: NDArray[np.float64]
    gold: NDArray[np.float64] | None


def best_of_n(
    model: GPT,
    prompts: Prompts,
    reward: Reward,
    n: int,
    *,
    max_new_tokens: int,
    params: SamplingParams,
    gold: Reward | None = None,
    places: Sequence[int] | None = None,
) -> BestOfN:
    """Sample ``n`` answers to each prompt and take the one that ``reward`` likes best, the first of equals.

    Args:
        gold: measured on all samples and not chosen by.
        places: which tasks of ``prompts``; default all, in their own order.

    Raises:
        UserError: n below 1, a temperature of 0 with n above 1, and what ``rollout`` and ``rewarded`` refuse.
    """
    if n < 1:
        raise UserError(f"n is {n}, expected at least 1")
    if n > 1 and params.temperature == 0.0:
        raise UserError("temperature is 0: all samples of a prompt are the same")
    chosen = range(len(prompts.tasks)) if places is None else places
    vocab = min(prompts.chat.tokenizer.vocab_size, model.config.vocab_size)
    rollouts = rollout(
        model, [prompts.ids[place] for place in chosen], max_new_tokens=max_new_tokens, params=params,
        stop_tokens=prompts.chat.stop_ids, num_samples=n, vocab_size=vocab,
    )  # fmt: skip
    answers = prompts.answers(rollouts, np.repeat(chosen, n).tolist())
    scores = rewarded(reward, answers).reshape(-1, n)
    best = [answers[row * n + int(place)] for row, place in enumerate(scores.argmax(axis=1))]
    own = None if gold is None else rewarded(gold, answers, "gold reward").reshape(-1, n)
    return BestOfN(best, scores, own)


def expected_best(
    scores: NDArray[np.float64], k: int, gold: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """(P,) expected score of the best of ``k`` samples, without bias from all n: for each k up to n from one sampling.

    ``gold`` (P, n): its expected value where ``scores`` (P, n) choose. The i-th smallest of n is the best of a random k
    of them with probability C(i - 1, k - 1) / C(n, k), as in pass@k (Chen et al. 2021, section 2.1); equal scores are
    ordered by place.
    """
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise UserError(f"k is {k}, expected 1 to the {n} samples of a prompt")
    # the first of equal scores is the one chosen, so it stands last in rising order
    order = np.argsort(-scores, axis=1, kind="stable")[:, ::-1]
    shares = np.array([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)])
    return (np.take_along_axis(scores if gold is None else gold, order, axis=1) * shares).sum(axis=1)


def divergence_bound(n: int) -> float:
    """``log n - (n - 1) / n``: nats that best-of-n is at most away from the model (Beirami et al. 2024, theorem 1)."""
    if n < 1:
        raise UserError(f"n is {n}, expected at least 1")
    return math.log(n) - (n - 1) / n
