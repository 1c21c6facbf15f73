"""Trust region policy optimisation (Schulman et al. 2015): a natural-gradient step within an exact divergence.

For small models and vocabularies: the divergence is that of whole distributions, which are kept, R·V numbers. Kernels
are differentiable once, so the product of the divergence's curvature with a vector is the difference of two gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcore.align import policy
from gptcore.align.experience import Experience
from gptcore.align.losses import aggregation, policy_gradient
from gptcore.align.losses.kl import exact
from gptcore.align.losses.values import value_loss
from gptcore.align.policy_update import Learner, minibatches
from gptcore.align.shares import accumulate, begin, step
from gptcore.errors import UserError
from gptcore.models import GPT
from gptcore.train.step import NonFiniteError

_DAMPING = 0.1  # added to the curvature's diagonal: directions that it hardly sees would be followed for ever
_SOLVER_STEPS = 10
_BACKTRACKS = 10
_PERTURBATION = (
    1e-2  # length of the two steps whose gradients are compared: between curvature's change and rounding
)


class Outcome(NamedTuple):
    """divergence: nats a token of the old policy from the new, at most the bound. improvement: of the surrogate.
    backtracks: halvings of the step; the weights are unchanged where none sufficed (``accepted`` False)."""

    divergence: float
    improvement: float
    backtracks: int
    accepted: bool


def trust_region_step(
    parameters: list[torch.nn.Parameter],
    surrogate: Callable[[], Tensor],
    divergence: Callable[[], Tensor],
    bound: float,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> Outcome:
    """Lower ``surrogate`` while ``divergence`` stays within ``bound``; ``parameters`` (f32) are changed in place.

    Args:
        surrogate: the loss, with gradients, 0-d. divergence: from where the parameters are now, 0-d; its gradient is 0
            there. total: sums up what several processes have of either, and of its gradient.

    Raises:
        UserError: parameters that are not f32.
        NonFiniteError: a gradient that is not finite; nothing has changed then.
    """
    if any(p.dtype != torch.float32 for p in parameters):
        raise UserError(
            "a trust region's curvature is a difference of gradients, for which weights must be float32"
        )
    start = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    own = surrogate()
    before, gradient = float(total(own.detach())), total(_flat(own, parameters))
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError("the surrogate's gradient is not finite; nothing was learnt from it", before)

    def curvature(vector: Tensor) -> Tensor:
        size = _PERTURBATION / float(vector.norm().clamp(min=1e-30))
        sides = []
        for sign in (size, -size):
            _put(start + sign * vector, parameters)
            sides.append(total(_flat(divergence(), parameters)))
        _put(start, parameters)
        return (sides[0] - sides[1]) / (2 * size) + _DAMPING * vector

    direction = _solved(curvature, -gradient)
    quadratic = float(direction @ curvature(direction))
    if not quadratic > 0.0:
        return Outcome(0.0, 0.0, 0, False)
    length = math.sqrt(2.0 * bound / quadratic)
    for halvings in range(_BACKTRACKS):
        _put(start + length * 0.5**halvings * direction, parameters)
        with torch.no_grad():
            moved, gained = float(total(divergence())), before - float(total(surrogate()))
        if moved <= bound and gained > 0.0:
            return Outcome(moved, gained, halvings, True)
    _put(start, parameters)
    return Outcome(0.0, 0.0, _BACKTRACKS, False)


def _solved(product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """x with product(x) = target, by conjugate gradients."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), residual @ residual
    for _ in range(_SOLVER_STEPS):
        if float(size) <= 1e-10 * float(target @ target):
            break
        image = product(direction)
        step = size / (direction @ image)
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual @ residual
        direction = residual + size / before * direction
    return x


def _flat(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([g.reshape(-1) for g in whole])


def _put(vector: Tensor, parameters: list[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(vector, parameters)


def whole_logits(model: GPT, batch: policy.Packed, temperature: float, vocab_size: int) -> Tensor:
    """(R, V) logits over ``temperature`` of the places that predict response tokens; -inf where truncation cut."""
    hidden = model.hidden(batch.tokens, cu_seqlens=batch.cu_seqlens)[0]
    logits = model.logits(hidden[batch.before])[:, :vocab_size] / temperature
    if batch.kept is None:
        return logits
    cut = torch.ones_like(logits, dtype=torch.bool)
    cut[batch.kept.rows, batch.kept.ids] = False
    return logits.masked_fill(cut, -torch.inf)


class TrustRegionLearner(Learner):
    """One step of the policy on all of an iteration's responses; the critic learns by minibatches as ever."""

    def learn(self, experience: Experience, iteration: int, lr: float, beta: float) -> dict[str, float]:
        """The step, then the critic's epochs."""
        spec, everyone = self.spec, experience.rollouts
        assert spec.trust_region is not None
        rows, weight = self._rows(len(everyone))
        rollouts, places = everyone.select(rows), torch.from_numpy(everyone.response_places_of(rows))
        batch = policy.packed(rollouts, next(self.actor.parameters()).device)
        mask = torch.ones(len(rollouts.logprobs), dtype=torch.bool)
        bounds = torch.from_numpy(rollouts.response_offsets.astype(np.int32))
        tokens = float(len(everyone.logprobs))
        by_token = aggregation.AGGREGATIONS[spec.aggregation] == "token_mean"
        with torch.no_grad():
            old = whole_logits(self.actor, batch, spec.temperature, self.vocab_size)
        chosen = batch.targets[0][batch.before][:, None]
        old_logprobs = old.log_softmax(-1).gather(1, chosen)[:, 0]

        def surrogate() -> Tensor:
            now = whole_logits(self.actor, batch, spec.temperature, self.vocab_size)
            logprobs = now.log_softmax(-1).gather(1, chosen)[:, 0]
            return weight * policy_gradient.surrogate(
                logprobs, old_logprobs, experience.advantages[places], mask, aggregation=spec.aggregation,
                cu_seqlens=bounds, length=spec.max_new_tokens, total=tokens if by_token else float(len(everyone)),
            )  # fmt: skip

        def divergence() -> Tensor:
            now = whole_logits(self.actor, batch, spec.temperature, self.vocab_size)
            return exact(old, now).sum() * (weight / tokens)

        parameters = [p for p in self.actor.parameters() if p.requires_grad]
        got = trust_region_step(parameters, surrogate, divergence, spec.trust_region, self.shares.total)
        self.updates += 1
        if self.average is not None:
            self.average.update(self.actor)
        seen = {
            "approx_kl": got.divergence, "surrogate_gain": got.improvement, "backtracks": float(got.backtracks),
            "accepted": float(got.accepted), "updates": 1.0,
        }  # fmt: skip
        return seen | self._teach_critic(experience, iteration, lr)

    def _teach_critic(self, experience: Experience, iteration: int, lr: float) -> dict[str, float]:
        if self.critic is None or self.critic_optimizer is None:
            return {}
        spec, losses = self.spec, []
        for group in self.critic_optimizer.param_groups:
            group["lr"] = self._critic_rate(lr)
        for rows in minibatches(len(experience.rollouts), spec, self.seed, iteration):
            chosen = experience.rollouts.select(rows)
            leaves = self.shares.leaves(np.diff(chosen.cu_seqlens), spec.micro_tokens)
            begin(self.critic_optimizer, len(leaves))
            found = []
            for leaf in leaves:
                loss = leaf.weight * self._value_loss(experience, rows[leaf.rows], len(chosen.logprobs))
                loss.backward()
                if len(leaves) > 1:
                    accumulate(self.critic_optimizer)
                found.append((leaf.number, {"loss": float(loss.detach())}))
            step(self.critic_optimizer)
            losses.append(self.shares.sums(found)["loss"])
        return {"value_loss": float(np.mean(losses))}

    def _value_loss(self, experience: Experience, rows: NDArray[np.int64], tokens: int) -> Tensor:
        """The responses' part of the loss of an update with so many tokens."""
        assert self.critic is not None and experience.returns is not None and experience.values is not None
        places = torch.from_numpy(experience.rollouts.response_places_of(rows))
        batch = policy.packed(experience.rollouts.select(rows), self.critic.weight.device)
        values = self.critic.values(batch, None)
        return value_loss(
            values, experience.returns[places], torch.ones_like(values, dtype=torch.bool),
            old_values=experience.values[places], clip=self.spec.value_clip, total=float(tokens),
        ).loss  # fmt: skip

    def _rows(self, episodes: int) -> tuple[NDArray[np.int64], float]:
        """This process's responses; where they are fewer than the processes, a last one counts 0 times."""
        rank, ranks = self.shares.member.rank, self.shares.member.ranks
        rows = np.array_split(np.arange(episodes), ranks)[rank]
        return (rows, 1.0) if len(rows) else (np.zeros(1, np.int64), 0.0)
