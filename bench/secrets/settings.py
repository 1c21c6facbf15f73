"""What the study does, stage by stage: frozen, checked, and the same numbers for the same settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gptcore.errors import UserError
from gptcore.models.schema import Spec, at_least


@dataclass(frozen=True)
class SecretsSpec(Spec):
    """The settings of :func:`bench.secrets.study.run`.

    Model: ``vocab_size``, ``layers``, ``width``, ``heads``. Updates see ``batch`` rows of ``length`` tokens.

    pretrain: ``pretrain_steps`` on Python's help pages, at ``lr``. start: ``start_steps`` on ``harmless`` questions,
    ``attacked`` ones, of which a share ``declined`` is not answered, and critiques, revisions and judgements of
    ``criticised`` answers, at ``lr``. measure: ``attacks`` and ``questions`` of the held-out part.

    constitution: the start model answers ``prompts`` questions and attacks, half of each, criticises and revises them,
    and learns its revisions for ``revision_steps`` at ``revision_lr``. preferences: it answers ``ranked`` of them
    ``samples`` times and judges the answers, at ``judge_temperature``. reward: ``reward_steps`` on ``reward_batch``
    rankings, at ``reward_lr``, with ``centring``. ppo: ``iterations`` of ``episodes`` answers, ``epochs`` times in
    minibatches of ``minibatch``, at ``ppo_lr`` and ``beta``, with ``ptx`` times the loss on harmless questions'
    answers. As many of these as prompts are learnt beside the revisions too.
    """

    section: ClassVar[str] = "secrets"

    seed: int = 1
    vocab_size: int = 1024
    layers: int = 3
    width: int = 96
    heads: int = 4
    length: int = 512
    batch: int = 4
    lr: float = 2e-3
    pretrain_steps: int = 300
    harmless: int = 6000
    attacked: int = 8000
    declined: float = 0.15
    criticised: int = 3000
    start_steps: int = 1200
    attacks: int = 500
    questions: int = 500
    prompts: int = 800
    revision_steps: int = 120
    revision_lr: float = 5e-4
    ranked: int = 600
    samples: int = 4
    judge_temperature: float = 0.0
    reward_steps: int = 150
    reward_batch: int = 16
    reward_lr: float = 5e-4
    centring: float = 0.1
    iterations: int = 16
    episodes: int = 256
    minibatch: int = 64
    epochs: int = 2
    ppo_lr: float = 1e-4
    beta: float = 0.3
    ptx: float = 0.5

    def validate(self) -> None:
        at_least(
            "secrets.", 0, seed=self.seed, beta=self.beta, ptx=self.ptx, centring=self.centring,
            judge_temperature=self.judge_temperature,
        )  # fmt: skip
        at_least(
            "secrets.", 1, layers=self.layers, width=self.width, heads=self.heads, batch=self.batch,
            pretrain_steps=self.pretrain_steps, start_steps=self.start_steps, attacks=self.attacks,
            questions=self.questions, revision_steps=self.revision_steps, reward_steps=self.reward_steps,
            reward_batch=self.reward_batch, iterations=self.iterations, episodes=self.episodes,
            minibatch=self.minibatch, epochs=self.epochs,
        )  # fmt: skip
        at_least(
            "secrets.", 2, harmless=self.harmless, attacked=self.attacked, criticised=self.criticised,
            prompts=self.prompts, samples=self.samples,
        )  # fmt: skip
        at_least("secrets.", 8, ranked=self.ranked)
        at_least("secrets.", 256, length=self.length)
        at_least("secrets.", 300, vocab_size=self.vocab_size)
        if not 0.0 <= self.declined < 1.0:
            raise UserError(f"secrets.declined: expected 0 or more and below 1, got {self.declined}")


TOY = {
    "vocab_size": 512, "layers": 1, "width": 32, "heads": 2, "length": 256, "batch": 2, "lr": 4e-3,
    "pretrain_steps": 4, "harmless": 200, "attacked": 300, "criticised": 400, "start_steps": 120, "attacks": 12,
    "questions": 12, "prompts": 12, "revision_steps": 4, "ranked": 24, "samples": 2, "judge_temperature": 1.0,
    "reward_steps": 3, "reward_batch": 2, "iterations": 2, "episodes": 8, "minibatch": 4, "epochs": 1,
}  # fmt: skip
