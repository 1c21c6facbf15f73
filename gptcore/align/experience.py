"""One iteration's data: responses sampled, judged, and turned into what the losses learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcore.align import policy
from gptcore.align.answers import Answer, Prompts, Reward, is_constant, rewarded
from gptcore.align.critic import Critic
from gptcore.align.losses import advantages as estimates
from gptcore.align.losses import kl
from gptcore.align.losses.layout import sequence_sum
from gptcore.align.reinforcement_spec import PPOSpec
from gptcore.align.shares import ALONE, Shares
from gptcore.infer import Rollouts, rollout
from gptcore.infer.rollouts import joined
from gptcore.models import GPT

# A model of its own, or a function whose context makes the actor the reference: adapters switched off, say.
Reference = GPT | Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Experience:
    """B responses with R tokens. Per token, (R,) f32: ``old_logprobs``, ``ref_logprobs`` (None without a reference),
    ``advantages``, and with a critic ``values`` and ``returns``. ``metrics`` are numbers for the log."""

    rollouts: Rollouts
    answers: list[Answer]
    scores: NDArray[np.float64]
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    values: Tensor | None
    returns: Tensor | None
    kl: float
    constant: bool
    metrics: dict[str, float]


class _Judged(NamedTuple):
    """Responses of one process: (B,) float64 rewards and, where they are measured, gold ones; (R,) f32 numbers."""

    rollouts: Rollouts
    answers: list[Answer]
    scores: NDArray[np.float64]
    gold: NDArray[np.float64] | None
    old: NDArray[np.float32]
    values: NDArray[np.float32] | None
    ref: NDArray[np.float32] | None


@dataclass
class Collector:
    """Samples and judges. ``gold`` is measured on the same answers and learnt from by nobody.

    Of several processes each samples and judges its share of the prompts, and all have the whole experience.
    """

    actor: GPT
    critic: Critic | None
    reference: Reference | None
    prompts: Prompts
    reward: Reward
    gold: Reward | None
    spec: PPOSpec
    stop_tokens: Sequence[int]
    seed: int
    shares: Shares = ALONE

    @property
    def vocab_size(self) -> int:
        """Tokens that may be sampled; a model's table may be padded beyond its tokenizer's."""
        return min(self.prompts.chat.tokenizer.vocab_size, self.actor.config.vocab_size)

    def collect(self, iteration: int, beta: float) -> Experience:
        """The experience of the iteration with zero-based index ``iteration``, a function of it and of the weights."""
        spec, count = self.spec, self.spec.episodes // self.spec.samples
        places = self.prompts.at(iteration * count, count)
        found = _joined(self.shares.of_all(lambda: self._judged(iteration, places)))
        rollouts, answers, scores = found.rollouts, found.answers, found.scores
        metrics = _described(rollouts, answers, scores)
        if found.gold is not None:
            metrics["gold_reward"] = float(found.gold.mean())
        shaped = spec.shaping().shaped(scores, rollouts, spec.max_new_tokens)
        old, values, ref = torch.from_numpy(found.old), _tensor(found.values), _tensor(found.ref)
        divergence = torch.zeros_like(old) if ref is None else kl.estimate(spec.kl_estimator, old, ref)
        whole = _bounds(rollouts)
        drift = 0.0 if ref is None else float(sequence_sum(kl.k1(old, ref), whole).mean())
        in_reward = beta if spec.kl_in == "reward" else 0.0
        learnt = self._advantages(torch.from_numpy(shaped).float(), divergence, in_reward, values, whole)
        metrics |= {"kl": drift, "kl_token": float(kl.k1(old, ref).mean()) if ref is not None else 0.0}
        metrics["entropy"] = float(rollouts.entropies.mean())
        return Experience(
            rollouts, answers, scores, old, ref, learnt.advantages, values,
            learnt.returns if values is not None else None, drift, is_constant(shaped), metrics,
        )  # fmt: skip

    def _judged(self, iteration: int, places: Sequence[int]) -> _Judged:
        """This process's share of the iteration's prompts, answered; random numbers are those of a response's place
        among all."""
        spec, own = self.spec, self.shares.prompts(len(places))
        first, stop = own.start * spec.samples, own.stop * spec.samples
        rollouts = rollout(
            self.actor, [self.prompts.ids[places[i]] for i in own], max_new_tokens=spec.max_new_tokens,
            params=spec.sampling(self.seed), stop_tokens=self.stop_tokens, num_samples=spec.samples,
            sequences=(iteration * spec.episodes + np.arange(first, stop)).tolist(), vocab_size=self.vocab_size,
            batch_size=min(spec.sampling_batch, spec.episodes),
        )  # fmt: skip
        answers = self.prompts.answers(rollouts, np.repeat([places[i] for i in own], spec.samples).tolist())
        scores = rewarded(self.reward, answers)
        gold = None if self.gold is None else rewarded(self.gold, answers, "gold reward")
        old, values = self._policy(rollouts)
        return _Judged(rollouts, answers, scores, gold, old, values, self._reference(rollouts))

    def _policy(self, rollouts: Rollouts) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """(R,) log-probabilities of the policy that sampled, and the critic's values."""
        critic, spec = self.critic, self.spec
        values = None
        if critic is not None and critic.trunk is not None:
            values = critic.evaluated(rollouts, spec.micro_tokens)
        logprobs = rollouts.logprobs
        shares = critic is not None and critic.trunk is None
        if spec.old_logprobs == "trainer" or shares:
            out = self._evaluated(
                self.actor, rollouts, critic.values if critic is not None and shares else None
            )
            values = out.values if shares else values
            logprobs = out.logprobs if spec.old_logprobs == "trainer" else logprobs
        return logprobs, values

    def _reference(self, rollouts: Rollouts) -> NDArray[np.float32] | None:
        if self.reference is None:
            return None
        if isinstance(self.reference, GPT):
            return self._evaluated(self.reference, rollouts).logprobs
        with self.reference():
            return self._evaluated(self.actor, rollouts).logprobs

    def _evaluated(
        self, model: GPT, rollouts: Rollouts, values: Callable[[policy.Packed, Tensor], Tensor] | None = None
    ) -> policy.Evaluated:
        spec = self.spec
        return policy.evaluated(
            model, rollouts, temperature=spec.temperature, vocab_size=self.vocab_size, values=values,
            max_tokens=spec.micro_tokens,
        )  # fmt: skip

    def _advantages(
        self, scores: Tensor, divergence: Tensor, beta: float, values: Tensor | None, bounds: Tensor
    ) -> estimates.Estimates:
        """(R,) advantages, and returns where there is a critic."""
        spec, mask = self.spec, torch.ones_like(divergence, dtype=torch.bool)
        if spec.estimator == "gae":
            assert values is not None
            rewards = estimates.token_rewards(scores, divergence, mask, beta, cu_seqlens=bounds)
            if spec.whiten_rewards:
                rewards = estimates.whiten(rewards, mask, shift_mean=False)
            found = estimates.gae(rewards, values, mask, gamma=spec.gamma, lam=spec.lam, cu_seqlens=bounds)
            if not spec.whiten_advantages:
                return found
            return found._replace(advantages=estimates.whiten(found.advantages, mask))
        penalised = scores - beta * sequence_sum(divergence, bounds)
        lengths = bounds.diff().long()
        own = self._compared(penalised)
        return estimates.Estimates(own.repeat_interleave(lengths), torch.zeros_like(divergence))

    def _compared(self, rewards: Tensor) -> Tensor:
        """(B,) advantages of whole responses."""
        groups = rewards.view(-1, self.spec.samples)
        if self.spec.estimator == "reinforce":
            return estimates.less_mean(rewards)
        if self.spec.estimator == "rloo":
            return estimates.rloo(groups).flatten()
        return estimates.group_relative(groups, scale=self.spec.estimator == "grpo").flatten()


def _joined(parts: Sequence[_Judged]) -> _Judged:
    """What all processes have, in the order of the prompts."""
    if len(parts) == 1:
        return parts[0]
    rollouts, answers, *arrays = zip(*parts, strict=True)
    whole = [None if part[0] is None else np.concatenate(part) for part in arrays]
    return _Judged(joined(rollouts), [one for part in answers for one in part], *whole)  # type: ignore[arg-type]


def _tensor(array: NDArray[np.float32] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def _bounds(rollouts: Rollouts) -> Tensor:
    return torch.from_numpy(rollouts.response_offsets.astype(np.int32))


def _described(
    rollouts: Rollouts, answers: Sequence[Answer], scores: NDArray[np.float64]
) -> dict[str, float]:
    lengths = rollouts.response_lengths
    return {
        "reward": float(scores.mean()),
        "reward_std": float(scores.std()),
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "cut_share": float(1.0 - rollouts.stopped.mean()),
        "empty_share": sum(not answer.text.strip() for answer in answers) / len(answers),
    }
