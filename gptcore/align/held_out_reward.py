"""How well a policy does on tasks that it does not learn from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from gptcore.align import policy
from gptcore.align.answers import Prompts, Reward, rewarded
from gptcore.align.experience import Reference
from gptcore.align.losses import kl
from gptcore.align.losses.layout import sequence_sum
from gptcore.infer import Rollouts, SamplingParams, rollout
from gptcore.models import GPT


def held_out_reward(
    prompts: Prompts,
    reward: Reward,
    *,
    max_new_tokens: int,
    params: SamplingParams,
    gold: Reward | None = None,
    reference: Reference | None = None,
) -> Callable[[GPT], dict[str, float]]:
    """An ``evaluate``: ``val_reward`` sampled as ``params`` say, ``val_reward_greedy`` at temperature 0, both the mean
    over all tasks of ``prompts`` with the same random numbers each time; ``val_length`` is of the sampled.

    Args:
        gold: a second judge of the same answers: ``val_gold_reward``, ``val_gold_reward_greedy``.
        reference: as ``ppo.run`` takes it: ``val_kl``, the divergence of the sampled in nats an answer.
    """

    def evaluate(model: GPT) -> dict[str, float]:
        found = {}
        vocab_size = min(prompts.chat.tokenizer.vocab_size, model.config.vocab_size)
        for end, own in (("", params), ("_greedy", replace(params, temperature=0.0))):
            got = rollout(
                model, prompts.ids, max_new_tokens=max_new_tokens, params=own, stop_tokens=prompts.chat.stop_ids,
                vocab_size=vocab_size,
            )  # fmt: skip
            answers = prompts.answers(got, list(range(len(prompts.tasks))))
            found[f"val_reward{end}"] = float(rewarded(reward, answers).mean())
            if gold is not None:
                found[f"val_gold_reward{end}"] = float(rewarded(gold, answers, "gold reward").mean())
            if not end:
                found["val_length"] = float(got.response_lengths.mean())
                if reference is not None:
                    found["val_kl"] = divergence(model, reference, got, params.temperature, vocab_size)
        return found

    return evaluate


def divergence(
    model: GPT, reference: Reference, rollouts: Rollouts, temperature: float, vocab_size: int
) -> float:
    """How far ``model``, which sampled ``rollouts``, is from ``reference``: the mean log-ratio of an answer, in nats.
    Exactly 0 where the two are the same weights."""
    read = functools.partial(
        policy.evaluated, rollouts=rollouts, temperature=temperature, vocab_size=vocab_size
    )
    own = read(model).logprobs
    with contextlib.nullcontext() if isinstance(reference, GPT) else reference():
        other = read(reference if isinstance(reference, GPT) else model).logprobs
    bounds = torch.from_numpy(rollouts.response_offsets.astype(np.int32))
    ratios = kl.k1(torch.from_numpy(own), torch.from_numpy(other))
    return float(sequence_sum(ratios, bounds).mean())
