"""What a run of reinforcement learning is put together from: settings that fit what there is, critic and learner."""

from __future__ import annotations

from gptcore.align.critic import Critic
from gptcore.align.experience import Collector, Reference
from gptcore.align.policy_update import Average, Learner
from gptcore.align.reinforcement_spec import PPOSpec
from gptcore.align.shares import Shares
from gptcore.align.trpo import TrustRegionLearner
from gptcore.errors import UserError
from gptcore.models import GPT
from gptcore.train import optimizers
from gptcore.train.config import TrainConfig
from gptcore.train.evaluation import Batches


def check(
    config: TrainConfig,
    spec: PPOSpec,
    shares: Shares,
    reference: Reference | None,
    pretraining: Batches | None,
) -> None:
    """Raises UserError where settings and what a run is given do not go together."""
    where, ranks = f"{spec.section}.", shares.member.ranks
    if pretraining is not None and spec.pretraining_batches % ranks:
        raise UserError(
            f"{where}pretraining_batches: got {spec.pretraining_batches} an update, expected a multiple of the {ranks} "
            "processes; take more of them, and a smaller data.batch"
        )
    shares.prompts(spec.episodes // spec.samples)
    if spec.beta and reference is None:
        raise UserError(
            f"{where}beta is {spec.beta}, but there is no reference; give one or set {where}beta=0"
        )
    if spec.pretraining_coefficient and pretraining is None:
        raise UserError(f"{where}pretraining_coefficient is set, but there is no pretraining text; give some")
    if pretraining is not None and not spec.pretraining_coefficient:
        raise UserError(f"there is pretraining text; set {where}pretraining_coefficient (InstructGPT: 27.8)")
    if spec.kl_target is not None and not spec.beta:
        raise UserError(f"{where}kl_target adapts {where}beta, which is 0; set one to begin with")
    if config.dtype == "float16":
        raise UserError("dtype: float16 is not for learning from rewards; use float32 or bfloat16")


def new_critic(actor: GPT, spec: PPOSpec) -> Critic:
    """A critic whose values are 0, on the actor's trunk or on a copy of it."""
    if spec.critic == "shared":
        return Critic(actor.config.width)
    weight = next(actor.parameters())
    trunk = GPT(actor.config, dtype=weight.dtype, device=weight.device)
    trunk.load_state_dict(actor.state_dict())
    return Critic(actor.config.width, trunk.eval())


def learner_of(
    config: TrainConfig, kind: type[Learner] | None, collector: Collector, pretraining: Batches | None
) -> Learner:
    """What learns from the experience, of ``kind`` or as the settings say."""
    spec, shares, actor, critic = collector.spec, collector.shares, collector.actor, collector.critic
    if kind is None:
        kind = Learner if spec.trust_region is None else TrustRegionLearner
    optimizer = optimizers.build(config.optimizer, actor, seed=config.seed)
    own = optimizers.build(config.optimizer, critic, seed=config.seed) if critic is not None else None
    average = None if spec.ema_decay is None else Average(actor, spec.ema_decay)
    return kind(
        actor, critic,
        optimizer if issubclass(kind, TrustRegionLearner) else shares.optimizer(optimizer, actor),  # which steps itself
        None if own is None or critic is None else shares.optimizer(own, critic),
        pretraining, spec, config.seed, collector.vocab_size, average, shares,
    )  # fmt: skip
