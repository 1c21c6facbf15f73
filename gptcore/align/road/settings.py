"""What a road does, stage by stage: frozen, checked, and the same numbers for the same settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gptcore.errors import UserError
from gptcore.models.schema import Spec, at_least


@dataclass(frozen=True)
class RoadSpec(Spec):
    """The settings of :func:`gptcore.align.road.run.run`.

    Model: ``layers``, ``width``, ``heads``. ``held_out`` prompts are measured on, greedily and at temperature 1; the
    demonstrations carry wrongly in a share ``noise`` of the cases near ten and slip in ``slips`` of the others; the
    rankings confuse ``ranking_noise`` of the grades.

    pretrain: ``pretrain_steps`` updates on columns of digits added. sft: ``sft_steps`` on ``demonstrations``. Both see
    ``batch`` rows of ``length`` tokens an update, at ``lr``. reward: the SFT model answers ``ranked_prompts`` prompts
    ``k`` times; ``reward_steps`` updates on ``reward_batch`` rankings, with ``centring``: pairs do not say what the
    answers to a prompt score on average, which would only be noise to PPO. ppo: ``ppo_iterations`` of ``episodes``,
    ``epochs`` times in minibatches of ``minibatch``, at ``ppo_lr`` and ``beta``. more_sft, the control, goes on
    imitating for as many floating-point operations as reward and ppo took. expert: ``expert_rounds`` of
    ``expert_prompts`` prompts with ``expert_samples`` answers each, of which fine-tuning takes the right ones.
    best_of: answers among which the reward model chooses.
    """

    section: ClassVar[str] = "road"

    seed: int = 1
    layers: int = 3
    width: int = 64
    heads: int = 4
    held_out: int = 1500
    length: int = 256
    batch: int = 6
    lr: float = 2e-3
    pretrain_steps: int = 200
    demonstrations: int = 4000
    noise: float = 0.6
    slips: float = 0.15
    sft_steps: int = 700
    ranked_prompts: int = 5000
    k: int = 6
    ranking_noise: float = 0.1
    reward_batch: int = 16
    reward_steps: int = 2000
    reward_lr: float = 1e-3
    centring: float = 0.1
    ppo_iterations: int = 30
    episodes: int = 512
    minibatch: int = 128
    epochs: int = 4
    ppo_lr: float = 5e-5
    beta: float = 0.3
    expert_rounds: int = 4
    expert_prompts: int = 1500
    expert_samples: int = 8
    best_of: int = 8

    def validate(self) -> None:
        at_least("road.", 0, seed=self.seed, beta=self.beta, centring=self.centring)
        at_least(
            "road.", 1, layers=self.layers, width=self.width, heads=self.heads, held_out=self.held_out,
            batch=self.batch, pretrain_steps=self.pretrain_steps, demonstrations=self.demonstrations,
            sft_steps=self.sft_steps, ranked_prompts=self.ranked_prompts, reward_batch=self.reward_batch,
            reward_steps=self.reward_steps, ppo_iterations=self.ppo_iterations, episodes=self.episodes,
            minibatch=self.minibatch, epochs=self.epochs, expert_rounds=self.expert_rounds,
            expert_prompts=self.expert_prompts, expert_samples=self.expert_samples,
        )  # fmt: skip
        at_least("road.", 2, k=self.k, best_of=self.best_of)
        at_least("road.", 32, length=self.length)
        for name in ("noise", "slips", "ranking_noise"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"road.{name}: expected 0 to 1, got {getattr(self, name)}")


FAST = {
    "held_out": 600, "ranked_prompts": 2500, "reward_steps": 600, "ppo_iterations": 12,
    "expert_rounds": 1, "expert_prompts": 600,
}  # fmt: skip
