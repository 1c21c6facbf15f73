"""The settings of the study: frozen, checked, and the same numbers for the same settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gptcore.errors import UserError
from gptcore.models.schema import Spec, at_least


@dataclass(frozen=True)
class PtxSpec(Spec):
    """The settings of :func:`bench.ptx.study.run`.

    Start: a GPT of ``layers``, ``width``, ``heads`` and ``context`` over a vocabulary of ``vocab_size``, seeded with
    ``start_seed``, reads ``pretrain_steps`` batches of ``rows`` rows of ``context`` tokens of the library's source at
    ``lr``, then ``sft_steps`` batches of real first lines at ``sft_lr``. ``text_bytes`` bounds the source of each part
    (0: all of it).

    Prompts have one of ``prompt_lengths`` tokens, since responses to prompts of one length are decoded together; an
    answer has at most ``max_new_tokens``.

    Both arms: ``iterations`` of ``episodes`` answers, learnt from ``epochs`` times in minibatches of ``minibatch`` at
    ``ppo_lr``, which falls to a tenth along a line, with ``beta`` adapted over ``kl_horizon`` episodes towards
    ``kl_target`` nats an answer. The one with ptx adds ``gamma`` times the mean loss on ``ptx_rows`` rows of the
    pretraining text to every update.

    Measured: bits per byte on ``held_out_rows`` rows of held-out source, before, after and every ``every`` iterations;
    ``answers`` answers to each held-out prompt before and after.
    """

    section: ClassVar[str] = "ptx"

    start_seed: int = 1
    split_seed: int = 6
    layers: int = 2
    width: int = 96
    heads: int = 4
    context: int = 128
    vocab_size: int = 1024
    text_bytes: int = 4_000_000
    rows: int = 16
    lr: float = 3e-3
    pretrain_steps: int = 500
    sft_lr: float = 5e-4
    sft_steps: int = 100
    prompt_lengths: tuple[int, ...] = (10, 12, 14, 16)
    max_new_tokens: int = 32
    iterations: int = 24
    episodes: int = 128
    minibatch: int = 32
    epochs: int = 2
    ppo_lr: float = 6e-4
    beta: float = 0.05
    kl_target: float = 2.0
    kl_horizon: float = 200.0
    gamma: float = 0.3
    ptx_rows: int = 4
    held_out_rows: int = 256
    every: int = 8
    answers: int = 8

    def validate(self) -> None:
        at_least("ptx.", 0, start_seed=self.start_seed, text_bytes=self.text_bytes)
        at_least(
            "ptx.", 1, layers=self.layers, width=self.width, heads=self.heads, rows=self.rows,
            pretrain_steps=self.pretrain_steps, sft_steps=self.sft_steps, max_new_tokens=self.max_new_tokens,
            iterations=self.iterations, episodes=self.episodes, minibatch=self.minibatch, epochs=self.epochs,
            ptx_rows=self.ptx_rows, held_out_rows=self.held_out_rows, every=self.every, answers=self.answers,
        )  # fmt: skip
        at_least("ptx.", 32, context=self.context)
        at_least("ptx.", 257, vocab_size=self.vocab_size)
        for name in ("lr", "sft_lr", "ppo_lr", "beta", "kl_target", "kl_horizon", "gamma"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise UserError(f"ptx.{name}: expected a positive number, got {getattr(self, name)}")
