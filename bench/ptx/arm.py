"""One arm: PPO from the shared start, with or without the pretraining mix, and what it came to."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.ptx.start import Start
from gptcore import train as training
from gptcore.align import policy
from gptcore.align.answers import Prompts, by_answer
from gptcore.align.ppo import run as learn
from gptcore.align.reinforcement_spec import PPOSpec, settings
from gptcore.align.tasks import docstrings
from gptcore.infer import SamplingParams, rollout
from gptcore.models import GPT

ARMS = ("ppo", "ppo-ptx")


@dataclass(frozen=True)
class Measured:
    """A model on held-out source and held-out prompts.

    bits_per_byte: of source. kl: nats an answer from the start, ``kl_error`` its standard error. Shares of answers:
    ``correct`` keep every rule and end, ``about`` have a word of the signature. reward: mean share of rules kept.
    answers: how many there were.
    """

    bits_per_byte: float
    kl: float
    kl_error: float
    correct: float
    about: float
    reward: float
    answers: int


def measure(start: Start, model: GPT, reference: GPT, prompts: Prompts, seed: int) -> Measured:
    """What ``model`` does with the held-out source and ``prompts``, at temperature 1."""
    spec = start.spec
    rollouts = rollout(
        model, prompts.ids, max_new_tokens=spec.max_new_tokens, params=SamplingParams(seed=seed),
        stop_tokens=start.chat.stop_ids, num_samples=spec.answers, vocab_size=start.tokenizer.vocab_size,
    )  # fmt: skip
    answers = prompts.answers(rollouts, np.repeat(np.arange(len(prompts.ids)), spec.answers).tolist())
    vocab = start.tokenizer.vocab_size
    own, other = (policy.evaluated(m, rollouts, vocab_size=vocab).logprobs for m in (model, reference))
    drift = np.add.reduceat((own - other).astype(np.float64), rollouts.response_offsets[:-1])
    right = [answer.stopped and docstrings.correct(answer.task, answer.text) for answer in answers]
    return Measured(
        bits_per_byte=float(start.bits_per_byte(model)["bits_per_byte"]),
        kl=float(drift.mean()),
        kl_error=float(drift.std() / len(drift) ** 0.5),
        correct=float(np.mean(right)),
        about=float(np.mean([docstrings.about(answer.task, answer.text) for answer in answers])),
        reward=float(np.mean([docstrings.reward(answer.task, answer.text) for answer in answers])),
        answers=len(answers),
    )


def run(start: Start, arm: str, seed: int, directory: Path, *, quiet: bool = True) -> dict[str, Any]:
    """Walk ``arm`` with ``seed`` in ``directory``, or what is left of it; a record fit for JSON.

    ``cpu_seconds`` are of this call: an arm that was stopped and goes on tells those since then.
    """
    began, busy = time.monotonic(), time.process_time()
    reference, actor = start.model(), start.model()
    spec, mixed = start.spec, arm == "ppo-ptx"
    table = {
        "run_dir": str(directory), "steps": spec.iterations, "seed": seed, "optimizer": {"lr": spec.ppo_lr},
        "schedule": {"name": "linear", "warmup": 0},
        "checkpoint": {"every": max(1, spec.iterations // 4), "keep_last": 1}, "evaluation": {"every": spec.every},
        "ppo": {
            "episodes": spec.episodes, "minibatch": spec.minibatch, "epochs": spec.epochs, "beta": spec.beta,
            "kl_target": spec.kl_target, "kl_horizon": spec.kl_horizon, "max_new_tokens": spec.max_new_tokens,
            "missing_end_penalty": 1.0, "sample_every": 0, "sampling_batch": 64,
            "pretraining_coefficient": spec.gamma * mixed,
        },
    }  # fmt: skip
    config, own = settings(PPOSpec, table, start.model_config)
    learn(
        config, own, actor=actor, reference=reference, prompts=start.prompts("train", seed),
        reward=by_answer(docstrings.reward), evaluate=start.bits_per_byte, quiet=quiet,
        pretraining=start.pretraining(spec.ptx_rows, seed) if mixed else None,
    )  # fmt: skip
    lines = training.metrics.read(directory / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    after = measure(start, actor, reference, start.prompts("held_out", seed), seed)
    return {
        "record": "arm", "arm": arm, "seed": seed, **vars(after), "beta": steps[-1]["beta"],
        "updates": round(sum(line["updates"] for line in steps)), "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - busy,
        "curve": [{key: line[key] for key in ("step", "kl", "reward", "beta")} for line in steps],
        "source": [
            {key: line[key] for key in ("step", "bits_per_byte")} for line in lines if line["kind"] == "evaluation"
        ],
    }  # fmt: skip
