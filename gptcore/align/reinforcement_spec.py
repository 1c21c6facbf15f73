"""The settings of learning from rewards: the table [ppo] or [grpo] beside those of ``TrainConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gptcore.align.answers import Shaping
from gptcore.align.losses.aggregation import AGGREGATIONS
from gptcore.errors import UserError, unknown_name
from gptcore.infer import SamplingParams
from gptcore.models.config import GPTConfig
from gptcore.models.schema import Spec, at_least
from gptcore.train.config import TrainConfig, from_table, merge

# What TrainConfig's own defaults are too bold for: Adam with the eps of PPO's code, no decay, a constant rate.
BASE: dict[str, Any] = {
    "steps": 100,
    "optimizer": {"name": "adam", "lr": 1e-5, "eps": 1e-5},
    "schedule": {"name": "constant", "warmup": 0},
    "evaluation": {"every": 0},
    "checkpoint": {"every": 20},
}


@dataclass(frozen=True)
class PPOSpec(Spec):
    """Proximal policy optimisation with a critic, and what it shares with the methods that need none.

    One iteration samples ``episodes`` responses, ``samples`` of them to each prompt, and learns from them ``epochs``
    times, ``minibatch`` responses an update, in an order drawn anew each epoch. ``steps`` of TrainConfig counts
    iterations; the learning rate is a function of them.

    Sampling: ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``; log-probabilities are those of that
    distribution. ``old_logprobs`` takes the old policy's from a pass of the trainer, which makes the first ratios
    exactly 1, or trusts the sampler's, equal within 1e-5 in f32, and saves that pass.

    Rewards: ``reward_clip``; ``missing_end_penalty`` for a response cut at the limit, which with ``missing_end =
    "replace"`` takes the reward's place; ``overlong_buffer`` and ``overlong_penalty``, a penalty that grows over the
    last tokens before the limit; ``whiten_rewards`` scales token rewards without shifting them.

    Divergence from the reference, in nats a token: ``beta`` (``kl_estimator`` k1, k2 or k3) taken from the reward or,
    with ``kl_in = "loss"``, added to the loss; ``kl_target`` nats an episode make beta adaptive over ``kl_horizon``
    episodes.

    Advantages: ``estimator`` gae (``gamma``, ``lam``, a critic), grpo, dr_grpo, rloo or reinforce, which compare the
    samples of a prompt, the last those of the batch; ``whiten_advantages`` for gae.

    Loss: ``clip``, ``clip_high`` upwards, ``dual_clip``, ``ratio`` per token or sequence (GSPO); ``aggregation`` of
    tokens (token_mean, grpo, dr_grpo, dapo, reinforce, ...); less ``entropy_coefficient`` times the mean entropy of
    the distributions sampled from, nats a token (Schulman et al. 2017, eq. 9); ``target_kl`` (nats a token, of the
    policy from that which sampled) ends the epochs of an iteration early; ``value_clip``, ``value_coefficient``;
    ``critic`` on the actor's trunk or on its own, with ``critic_lr`` (default the actor's). ``pretraining_coefficient``
    is PPO-ptx's gamma (InstructGPT: 27.8), over ``pretraining_batches`` batches an update. ``ema_decay`` keeps an
    average of the weights. ``trust_region`` (nats a token) replaces the optimizer by TRPO's step.

    ``micro_tokens`` bounds the tokens of a forward pass of learning, ``sampling_batch`` the responses that are sampled
    at a time, and with them the cache; neither changes a result. Several processes share prompts and updates, with one
    process's results but for rounding, or where ``grain`` responses go through forward and backward together, whatever
    ``micro_tokens`` says, with its bits (0: as many as there is room for). Every ``sample_every`` iterations
    ``samples_shown`` answers are shown.
    """

    section: ClassVar[str] = "ppo"

    episodes: int = 512
    samples: int = 1
    minibatch: int = 64
    epochs: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    reward_clip: float | None = None
    missing_end_penalty: float = 0.0
    missing_end: Literal["subtract", "replace"] = "subtract"
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    whiten_rewards: bool = False
    beta: float = 0.02
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["reward", "loss"] = "reward"
    kl_target: float | None = None
    kl_horizon: float = 10000.0
    estimator: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce"] = "gae"
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    aggregation: str = "token_mean"
    entropy_coefficient: float = 0.0
    target_kl: float | None = None
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    critic: Literal["shared", "separate"] = "shared"
    critic_lr: float | None = None
    pretraining_coefficient: float = 0.0
    pretraining_batches: int = 1
    ema_decay: float | None = None
    trust_region: float | None = None
    micro_tokens: int = 4096
    grain: int = 0
    sampling_batch: int = 512
    sample_every: int = 10
    samples_shown: int = 2

    def validate(self) -> None:
        where = f"{self.section}."
        at_least(
            where, 1, episodes=self.episodes, samples=self.samples, minibatch=self.minibatch, epochs=self.epochs,
            max_new_tokens=self.max_new_tokens, pretraining_batches=self.pretraining_batches,
            micro_tokens=self.micro_tokens, sampling_batch=self.sampling_batch, samples_shown=self.samples_shown,
        )  # fmt: skip
        at_least(
            where, 0, overlong_buffer=self.overlong_buffer, overlong_penalty=self.overlong_penalty, beta=self.beta,
            missing_end_penalty=self.missing_end_penalty, clip=self.clip, clip_high=self.clip_high,
            value_clip=self.value_clip, value_coefficient=self.value_coefficient, critic_lr=self.critic_lr,
            pretraining_coefficient=self.pretraining_coefficient, sample_every=self.sample_every,
            entropy_coefficient=self.entropy_coefficient, grain=self.grain,
        )  # fmt: skip
        at_least(where, 1.0, dual_clip=self.dual_clip)
        for name in ("temperature", "reward_clip", "kl_target", "kl_horizon", "target_kl", "trust_region"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise UserError(f"{where}{name}: expected a positive number, got {value}")
        for name in ("gamma", "lam", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise UserError(f"{where}{name}: expected 0 to 1, got {value}")
        self._check_counts(where)
        if self.aggregation not in AGGREGATIONS:
            raise unknown_name(f"{where}aggregation", self.aggregation, AGGREGATIONS)
        self.sampling(0)

    def _check_counts(self, where: str) -> None:
        """Responses that do not divide into prompts and updates."""
        for name, part in (("samples", self.samples), ("minibatch", self.minibatch)):
            if self.episodes % part:
                raise UserError(f"{where}{name}: {part} does not divide {where}episodes {self.episodes}")
        if self.estimator in ("grpo", "dr_grpo", "rloo") and self.samples < 2:
            raise UserError(
                f"{where}samples: {self.estimator} compares at least 2 to a prompt, got {self.samples}"
            )
        if self.trust_region is not None and self.estimator == "gae" and self.critic == "shared":
            raise UserError(
                f"{where}critic: a trust region is the policy's alone; set {where}critic=separate"
            )
        seconds = {
            "pretraining_coefficient": self.pretraining_coefficient, "entropy_coefficient": self.entropy_coefficient,
            "kl_in": self.beta if self.kl_in == "loss" else 0.0,
        }  # fmt: skip
        second = next((name for name, weight in seconds.items() if weight), None)
        if self.trust_region is not None and second:
            raise UserError(
                f"{where}{second}: a trust region's step has no second loss; leave one of the two out"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise UserError(
                f"{where}overlong_buffer: {self.overlong_buffer} is more than max_new_tokens {self.max_new_tokens}"
            )

    def sampling(self, seed: int) -> SamplingParams:
        """How responses are sampled."""
        return SamplingParams(self.temperature, self.top_k, self.top_p, seed)

    def shaping(self) -> Shaping:
        """What is made of rewards."""
        replaces = self.missing_end == "replace"
        return Shaping(
            self.reward_clip, self.missing_end_penalty, replaces, self.overlong_buffer, self.overlong_penalty
        )


@dataclass(frozen=True)
class GRPOSpec(PPOSpec):
    """Group-relative policy optimisation as published (Shao et al. 2024): no critic, the divergence (k3) in the loss.

    ``estimator = "dr_grpo"`` with ``aggregation = "dr_grpo"`` is Dr. GRPO; ``aggregation = "dapo"``, ``clip_high =
    0.28`` and ``beta = 0`` DAPO; ``ratio = "sequence"`` GSPO; ``estimator = "rloo"`` or "reinforce" with ``epochs = 1``
    and ``aggregation = "reinforce"`` are those, with ``kl_in = "reward"`` and ``kl_estimator = "k1"``. The fields are
    those of PPOSpec.
    """

    section: ClassVar[str] = "grpo"

    samples: int = 8
    epochs: int = 1
    beta: float = 0.04
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["reward", "loss"] = "loss"
    estimator: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"
    whiten_advantages: bool = False
    aggregation: str = "grpo"


def settings(spec: type[PPOSpec], table: Mapping[str, Any], model: GPTConfig) -> tuple[TrainConfig, PPOSpec]:
    """The settings of a run on ``model`` from nested plain values: ``table`` without ``spec.section`` is TrainConfig's.

    Raises UserError as ``Spec`` does.
    """
    training = {name: value for name, value in table.items() if name != spec.section}
    base = merge(BASE, {"model": model.to_dict(), "data": {"length": model.context_length}})
    chosen = training.get("optimizer", {})
    if isinstance(chosen, Mapping) and chosen.get("name", "adam") not in ("adam", "adamw"):
        base["optimizer"] = {
            name: value for name, value in base["optimizer"].items() if name != "eps"
        }  # Adam's
    return from_table(merge(base, training)), spec.from_dict(table.get(spec.section, {}))
