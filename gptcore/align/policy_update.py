"""Learning from one iteration's experience: epochs of minibatches, each one update of actor and critic."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcore.align import policy
from gptcore.align.critic import Critic
from gptcore.align.experience import Experience
from gptcore.align.losses import aggregation, kl, policy_gradient
from gptcore.align.losses.values import value_loss
from gptcore.align.reinforcement_spec import PPOSpec
from gptcore.align.shares import ALONE, Shares, accumulate, begin, step
from gptcore.data.permutation import derive
from gptcore.models import GPT
from gptcore.train.evaluation import Batches, tensors_of
from gptcore.train.sharding import Optimizer
from gptcore.train.step import NonFiniteError


@dataclass(frozen=True)
class _Part:
    """Some of an iteration's responses as a model takes them, and where their tokens stand in the experience."""

    experience: Experience
    batch: policy.Packed
    places: Tensor
    bounds: Tensor
    mask: Tensor

    @classmethod
    def of(cls, experience: Experience, rows: NDArray[np.int64], device: torch.device) -> _Part:
        rollouts = experience.rollouts.select(rows)
        places = torch.from_numpy(experience.rollouts.response_places_of(rows))
        bounds = torch.from_numpy(rollouts.response_offsets.astype(np.int32)).to(device)
        mask = torch.ones(len(places), dtype=torch.bool, device=device)
        return cls(experience, policy.packed(rollouts, device), places, bounds, mask)

    def take(self, values: Tensor | None) -> Tensor:
        """Those of these tokens, of (R,) numbers of all."""
        assert values is not None
        return values[self.places].to(self.bounds.device)


@dataclass
class Learner:
    """Updates actor and critic. ``updates`` counts them over the run, which is also the place in ``pretraining``.

    Of several processes all have the experience, and each learns from its leaves of every update.
    """

    actor: GPT
    critic: Critic | None
    optimizer: Optimizer
    critic_optimizer: Optimizer | None
    pretraining: Batches | None
    spec: PPOSpec
    seed: int
    vocab_size: int
    average: Average | None = None
    shares: Shares = ALONE
    updates: int = 0
    _sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def learn(self, experience: Experience, iteration: int, lr: float, beta: float) -> dict[str, float]:
        """All epochs over ``experience``; means of the diagnostics over the updates that were made.

        Raises NonFiniteError, before a weight is touched, where loss or gradient is not finite.
        """
        spec = self.spec
        for optimizer, rate in ((self.optimizer, lr), (self.critic_optimizer, self._critic_rate(lr))):
            for group in [] if optimizer is None else optimizer.param_groups:
                group["lr"] = rate
        self._sums.clear()
        made, stopped = 0, False
        for rows in minibatches(len(experience.rollouts), spec, self.seed, iteration):
            divergence = self._gradients(experience, rows, beta, iteration)
            if spec.target_kl is not None and divergence > 1.5 * spec.target_kl:
                stopped = True
                self._zero_grad()
                break
            self._step(iteration, lr)
            made += 1
        found = {name: value / max(1, made + stopped) for name, value in self._sums.items()}
        return {**found, "updates": float(made), "stopped_early": float(stopped)}

    def _critic_rate(self, lr: float) -> float:
        return lr if self.spec.critic_lr is None else self.spec.critic_lr

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()

    def _gradients(
        self, experience: Experience, rows: NDArray[np.int64], beta: float, iteration: int
    ) -> float:
        """Gradients of one minibatch, in micro-batches; returns the divergence from the policy that sampled."""
        spec = self.spec
        chosen = experience.rollouts.select(rows)
        tokens = len(chosen.logprobs)
        by_token = aggregation.AGGREGATIONS[spec.aggregation] == "token_mean"
        total = float(tokens if by_token else len(rows))
        leaves = self.shares.leaves(np.diff(chosen.cu_seqlens), spec.micro_tokens)
        texts = self.shares.numbers(spec.pretraining_batches) if self.pretraining is not None else range(0)
        begin(self.optimizer, len(leaves) + len(texts))
        if self.critic_optimizer is not None:
            begin(self.critic_optimizer, len(leaves))  # which text does not reach
        several, found = len(leaves) + len(texts) > 1, []
        for leaf in leaves:
            loss, seen = self._loss(experience, rows[leaf.rows], total, tokens, beta)
            (loss * leaf.weight).backward()
            self._accumulate(several)
            found.append((leaf.number, {name: value * leaf.weight for name, value in seen.items()}))
        for index in texts:
            found.append((len(rows) + index, {"pretraining_loss": self._remember(index)}))
            self._accumulate(several)
        sums = self.shares.sums(found)
        if not math.isfinite(sums["loss"]):
            self._zero_grad()
            raise NonFiniteError(
                f"the policy's loss is {sums['loss']} in iteration {iteration + 1}; {_ADVICE}"
            )
        if self.critic is not None:
            sums["explained_variance"] = _explained(sums, experience, rows)
        for name, value in sums.items():
            self._sums[name] += value
        return sums["approx_kl"]

    def _accumulate(self, several: bool) -> None:
        for optimizer in (self.optimizer, self.critic_optimizer) if several else ():
            if optimizer is not None:
                accumulate(optimizer)

    def _loss(
        self, experience: Experience, rows: NDArray[np.int64], total: float, tokens: int, beta: float
    ) -> tuple[Tensor, dict[str, float]]:
        """A micro-batch's part of the minibatch's loss, and of its diagnostics."""
        spec, part = self.spec, _Part.of(experience, rows, next(self.actor.parameters()).device)
        out = policy.scores(
            self.actor, part.batch, temperature=spec.temperature, vocab_size=self.vocab_size,
            entropy_slopes=spec.entropy_coefficient != 0.0,
        )  # fmt: skip
        loss, seen = self._policy_loss(part, out.logprobs, total, beta)
        if spec.entropy_coefficient:
            bonus = policy_gradient.entropy_bonus(
                out.entropies, part.mask, cu_seqlens=part.bounds, total=float(tokens)
            )
            loss = loss - spec.entropy_coefficient * bonus
            seen["entropy_bonus"] = bonus
        means = {"clip_share", "ratio", "approx_kl", "value_clip_share", "residual", "residual_square"}
        if self.critic is not None:
            values = self.critic.values(part.batch, out.hidden)
            error = value_loss(
                values, part.take(experience.returns), part.mask, old_values=part.take(experience.values),
                clip=spec.value_clip, total=float(tokens),
            )  # fmt: skip
            loss = loss + spec.value_coefficient * error.loss
            residual = part.take(experience.returns).double() - values.detach().double()
            seen |= {
                "value_loss": error.loss, "value_clip_share": error.clip_share, "residual": residual.mean(),
                "residual_square": residual.square().mean(),
            }  # fmt: skip
        share = len(part.places) / tokens  # of what is a mean over the micro-batch, not a part of a sum
        found = {
            name: float(value.detach()) * (share if name in means else 1.0) for name, value in seen.items()
        }
        return loss, {**found, "loss": float(loss.detach())}

    def _policy_loss(
        self, part: _Part, logprobs: Tensor, total: float, beta: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        spec, experience = self.spec, part.experience
        how: dict[str, Any] = {
            "aggregation": spec.aggregation, "cu_seqlens": part.bounds, "total": total,
            "length": spec.max_new_tokens,
        }  # fmt: skip
        got = policy_gradient.ppo(
            logprobs, part.take(experience.old_logprobs), part.take(experience.advantages), part.mask,
            clip=spec.clip, clip_high=spec.clip_high, dual_clip=spec.dual_clip, level=spec.ratio, **how,
        )  # fmt: skip
        seen = {
            "policy_loss": got.loss, "clip_share": got.clip_share, "ratio": got.ratio, "approx_kl": got.approx_kl,
        }  # fmt: skip
        if spec.kl_in != "loss" or not beta or experience.ref_logprobs is None:
            return got.loss, seen
        penalty = kl.estimate(spec.kl_estimator, logprobs, part.take(experience.ref_logprobs))
        return got.loss + beta * aggregation.aggregate(penalty, part.mask, **how), seen

    def _remember(self, index: int) -> float:
        """PPO-ptx: gamma times the gradient of the loss on a batch of pretraining text; its share of their mean."""
        spec = self.spec
        assert self.pretraining is not None
        batch = self.pretraining.batch_at(self.updates * spec.pretraining_batches + index)
        tokens, targets, options = tensors_of(batch, next(self.actor.parameters()).device)
        loss = self.actor(tokens, targets, **options).loss
        (loss * (spec.pretraining_coefficient / spec.pretraining_batches)).backward()
        return float(loss.detach()) / spec.pretraining_batches

    def _step(self, iteration: int, lr: float) -> None:
        step(self.optimizer)
        if self.optimizer.found_inf:
            raise NonFiniteError(f"a gradient is not finite in iteration {iteration + 1}; {_ADVICE}")
        self._sums["grad_norm"] += float(self.optimizer.last_grad_norm or 0.0)
        if self.critic_optimizer is not None:
            step(self.critic_optimizer)
        self.updates += 1
        if self.average is not None:
            self.average.update(self.actor)


def _explained(sums: dict[str, float], experience: Experience, rows: NDArray[np.int64]) -> float:
    """The share of the variance of a minibatch's returns that the values explain, 0 where returns are constant; takes
    the moments of what they leave, which its parts could add up, out of ``sums``."""
    assert experience.returns is not None
    mean, square = sums.pop("residual"), sums.pop("residual_square")
    places = torch.from_numpy(experience.rollouts.response_places_of(rows))
    spread = float(experience.returns[places].double().var(correction=0))
    return 1.0 - (square - mean * mean) / spread if spread > 0.0 else 0.0


_ADVICE = "lower optimizer.lr, clip rewards, or raise beta; the last checkpoint is intact"


def minibatches(episodes: int, spec: PPOSpec, seed: int, iteration: int) -> Iterator[NDArray[np.int64]]:
    """Places of the responses of each update, epoch after epoch: a shuffle that (seed, iteration, epoch) decide."""
    for epoch in range(spec.epochs):
        order = np.random.default_rng(derive(seed, iteration, epoch)).permutation(episodes)
        yield from order.reshape(-1, spec.minibatch)


class Average:
    """An exponential moving average of a model's weights, f32 (Ouyang et al. 2022, appendix C.4: decay 0.992)."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Once after each update."""
        for name, p in model.named_parameters():
            self.weights[name].lerp_(p.detach().float(), 1.0 - self.decay)
