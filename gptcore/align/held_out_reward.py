"""How well a policy does on tasks that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gptcore.align.answers import Prompts, Reward, rewarded
from gptcore.infer import SamplingParams, rollout
from gptcore.models import GPT


def held_out_reward(
    prompts: Prompts, reward: Reward, *, max_new_tokens: int, params: SamplingParams
) -> Callable[[GPT], dict[str, float]]:
    """An ``evaluate``: ``val_reward`` sampled as ``params`` say, ``val_reward_greedy`` at temperature 0, both the mean
    over all tasks of ``prompts`` with the same random numbers each time; ``val_length`` is of the sampled."""

    def evaluate(model: GPT) -> dict[str, float]:
        found = {}
        for name, own in (("val_reward", params), ("val_reward_greedy", replace(params, temperature=0.0))):
            got = rollout(
                model, prompts.ids, max_new_tokens=max_new_tokens, params=own, stop_tokens=prompts.chat.stop_ids,
                vocab_size=min(prompts.chat.tokenizer.vocab_size, model.config.vocab_size),
            )  # fmt: skip
            scores = rewarded(reward, prompts.answers(got, list(range(len(prompts.tasks)))))
            found[name] = float(scores.mean())
            found.setdefault("val_length", float(got.response_lengths.mean()))
        return found

    return evaluate
