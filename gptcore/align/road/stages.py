"""The stages of the road. Each trains in a directory of its own, resumes there, and returns what it measured.

A stage's result is written when it has ended, with the settings it was made with; a stage whose result is there is not
run again. Within a stage training resumes from its last checkpoint.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptcore import train as training
from gptcore.align import rankings, reward_model
from gptcore.align.answers import Prompts, by_answer, by_model
from gptcore.align.best_of_n import best_of_n
from gptcore.align.reward_model import RewardModel
from gptcore.align.road.settings import RoadSpec
from gptcore.align.tasks import arithmetic
from gptcore.data.characters import CharacterTokenizer
from gptcore.data.chat import Chat, chat_for
from gptcore.data.example_loader import ExampleLoader, Served
from gptcore.data.examples import Tokenised
from gptcore.data.records import Task, text_of
from gptcore.infer import SamplingParams, trained
from gptcore.infer.rollout import Rollouts, rollout
from gptcore.infer.trained import TOKENIZER_DIRECTORY
from gptcore.models import GPT, GPTConfig

_NEW_TOKENS = 24  # the longest right completion, 9+9=18,9+9+1=19;198, has 19 characters and its end
_NORMALISING = 1000  # answers whose scores set the reward model's mean and deviation
_TRAINING = 6.0  # floating-point operations of a training step, per parameter and token


@dataclass(frozen=True)
class Road:
    """What every stage needs: where it works, the settings, tasks and tokenizer."""

    directory: Path
    spec: RoadSpec
    quiet: bool = False

    @cached_property
    def tokenizer(self) -> CharacterTokenizer:
        """One token a character, and one that ends a text."""
        return CharacterTokenizer(arithmetic.ALPHABET)

    @cached_property
    def tasks(self) -> arithmetic.Split:
        """What is trained on and what is measured on."""
        return arithmetic.split(self.spec.held_out, self.spec.seed)

    @cached_property
    def model_config(self) -> GPTConfig:
        """The policy's; its context is the longest prompt with its answer."""
        spec = self.spec
        return GPTConfig.from_dict(
            {
                "vocab_size": self.tokenizer.vocab_size, "num_layers": spec.layers, "width": spec.width,
                "context_length": 48, "attention": {"num_heads": spec.heads},
            }
        )  # fmt: skip

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer with no template: a prompt is what is written."""
        return chat_for(self.tokenizer, "none")

    def prompts(self, tasks: Sequence[Task]) -> Prompts:
        """``tasks`` as what is asked of a policy."""
        room = self.model_config.context_length - _NEW_TOKENS
        return Prompts(tasks, self.chat, room=room, seed=self.spec.seed)

    @property
    def end(self) -> int:
        """The token that ends a text."""
        assert self.tokenizer.eot is not None
        return self.tokenizer.eot

    def model(self, stage: str) -> GPT:
        """The policy that ``stage`` ended with."""
        return trained.load(self.directory / stage)[0]

    def settings(self, stage: str, steps: int, lr: float, **tables: Any) -> training.TrainConfig:
        """The settings of a stage's training; checkpoints ten times under way."""
        return training.from_table(
            {
                "run_dir": str(self.directory / stage), "steps": steps, "seed": self.spec.seed,
                "model": self.model_config.to_dict(), "log_every": max(1, steps // 200),
                "data": {"batch": self.spec.batch, "length": self.model_config.context_length},
                "optimizer": {"lr": lr, "weight_decay": 0.0, "betas": [0.9, 0.95]},
                "schedule": {"name": "cosine", "warmup": min(20, steps // 5)},
                "evaluation": {"every": 0}, "checkpoint": {"every": max(1, steps // 10), "keep_last": 1}, **tables,
            }
        )  # fmt: skip


def imitate(road: Road, stage: str, model: GPT, examples: Sequence[Tokenised], steps: int) -> None:
    """Train ``model`` on ``examples`` for ``steps`` updates in the directory of ``stage``.

    What pretraining, fine-tuning and its control, and expert iteration have in common.
    """
    spec, tokenizer = road.spec, road.tokenizer
    served = Served(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.byte_lengths())
    loader = ExampleLoader({stage: examples}, served, batch=spec.batch, length=spec.length, seed=spec.seed)
    config = road.settings(stage, steps, spec.lr)
    tokenizer.save(Path(config.run_dir) / TOKENIZER_DIRECTORY)
    training.run(
        config, model=model, loader=loader, tokenizer=tokenizer, quiet=road.quiet, measure_peak=False
    )


def pretrain(road: Road) -> dict[str, Any]:
    """A language model of columns of digits added, in no order."""
    texts = arithmetic.columns(4000, road.spec.seed)
    examples = [_whole(road.tokenizer.encode(text), road.end) for text in texts]
    model = GPT(road.model_config, seed=road.spec.seed)
    imitate(road, "pretrain", model, examples, road.spec.pretrain_steps)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def fine_tune(road: Road) -> dict[str, Any]:
    """Imitation of the demonstrations, mistakes and all, responses only."""
    imitate(road, "sft", road.model("pretrain"), _demonstrated(road), road.spec.sft_steps)
    return {}


def train_reward_model(road: Road) -> dict[str, Any]:
    """Rank what the fine-tuned model answers, and learn to; a tenth of the rankings is kept to measure on.

    Where :func:`reward_model.evaluation` normalises: scores of the model's answers are 0 on average.
    """
    spec, policy, tokenizer = road.spec, road.model("sft"), road.tokenizer
    ranked, answers = _ranked(road, policy)
    kept = max(1, len(ranked) // 10)
    loader = rankings.RankingLoader(
        ranked[kept:], tokenizer.fingerprint, tokenizer.vocab_size, batch=spec.reward_batch, seed=spec.seed
    )
    config = road.settings(
        "reward", spec.reward_steps, spec.reward_lr, evaluation={"every": spec.reward_steps}
    )
    tokenizer.save(Path(config.run_dir) / TOKENIZER_DIRECTORY)
    model = RewardModel.over(policy, seed=spec.seed, centring=spec.centring)
    training.run(
        config, model=model, loader=loader, tokenizer=tokenizer, quiet=road.quiet, measure_peak=False,
        evaluate=reward_model.evaluation(ranked[:kept], answers),
    )  # fmt: skip
    found = model.losses_of(ranked[:kept])
    tokens = np.mean([sum(len(answer.tokens) for answer in one.answers) for one in ranked[kept:]])
    return {
        "rankings": len(ranked), "pair_accuracy": found.accuracy, "pairs": found.pairs,
        "tokens": round(float(tokens) * spec.reward_batch * spec.reward_steps),
    }  # fmt: skip


def _ranked(road: Road, policy: GPT) -> tuple[list[rankings.Ranked], list[Tokenised]]:
    """Answers of ``policy`` as somebody who knows better ranks them, and as many of the answers as normalise."""
    spec = road.spec
    drawn = random.Random(f"road prompts {spec.seed}")
    asked = drawn.sample(road.tasks.train, min(spec.ranked_prompts, len(road.tasks.train)))
    texts = answers_of(road, sampled(road, policy, asked, spec.k, temperature=1.0, seed=spec.seed))
    made = [
        arithmetic.ranking(task, texts[number * spec.k : (number + 1) * spec.k], spec.ranking_noise, drawn)
        for number, task in enumerate(asked)
    ]
    ranked, _ = rankings.tokenised(
        [one for one in made if one], road.chat, length=road.model_config.context_length
    )
    own = [
        road.chat.response(task.prompt, texts[number * spec.k])
        for number, task in enumerate(asked[:_NORMALISING])
    ]
    return ranked, own


def reinforce(road: Road, reward: RewardModel) -> dict[str, Any]:
    """PPO on the reward model's scores, from the fine-tuned model; the verifier only watches."""
    from gptcore.align.ppo import run as learn
    from gptcore.align.reinforcement_spec import PPOSpec, settings

    spec, actor = road.spec, road.model("sft")
    table = {
        "run_dir": str(road.directory / "ppo"), "steps": spec.ppo_iterations, "seed": spec.seed,
        "optimizer": {"lr": spec.ppo_lr}, "checkpoint": {"every": max(1, spec.ppo_iterations // 10), "keep_last": 1},
        "ppo": {
            "episodes": spec.episodes, "minibatch": spec.minibatch, "epochs": spec.epochs, "beta": spec.beta,
            "max_new_tokens": _NEW_TOKENS, "sample_every": 0, "missing_end_penalty": 1.0,
        },
    }  # fmt: skip
    config, own = settings(PPOSpec, table, road.model_config)

    prompts = road.prompts(road.tasks.train)
    learn(
        config, own, actor=actor, reference=copy.deepcopy(actor), prompts=prompts, reward=by_model(reward.scores),
        gold=by_answer(arithmetic.reward), quiet=road.quiet,
    )  # fmt: skip
    lines = training.metrics.read(road.directory / "ppo" / "metrics.jsonl")
    rows = [line for line in lines if line["kind"] == "train"]
    curve = [
        {"kl": row["kl"], "proxy": row["reward"], "gold": row["gold_reward"], "step": row["step"]}
        for row in rows
    ]
    prompt_tokens = sum(len(prompts.ids[0]) for _ in rows) * spec.episodes  # prompts are of one length
    return {"curve": curve, "tokens": rows[-1]["tokens"] + prompt_tokens}


def more_imitation(road: Road, reward_tokens: int, ppo_tokens: int) -> dict[str, Any]:
    """The control: what the operations of reward model and PPO buy when they are spent on further imitation.

    A token of PPO costs a forward pass each of sampling, the old and the reference policy and the reward model, and a
    training step in each epoch.
    """
    spec = road.spec
    spent = _TRAINING * reward_tokens + (4 * 2.0 + _TRAINING * spec.epochs) * ppo_tokens
    steps = max(1, round(spent / (_TRAINING * spec.batch * spec.length)))
    imitate(road, "more_sft", road.model("sft"), _demonstrated(road), steps)
    return {"steps": steps}


def iterate_expert(road: Road) -> dict[str, Any]:
    """The baseline: sample, keep what the verifier calls right, imitate that, again."""
    spec, tokenizer = road.spec, road.tokenizer
    stage, kept = "sft", []
    model = road.model(stage)
    for number in range(spec.expert_rounds):
        drawn = random.Random(f"road expert {spec.seed} {number}")
        asked = drawn.sample(road.tasks.train, min(spec.expert_prompts, len(road.tasks.train)))
        rollouts = sampled(road, model, asked, spec.expert_samples, temperature=1.0, seed=spec.seed + number)
        right: dict[tuple[str, str], None] = {}
        for place, text in enumerate(answers_of(road, rollouts)):
            task = asked[place // spec.expert_samples]
            if rollouts.stopped[place] and arithmetic.reward(task, text):
                right[text_of(task.prompt), text] = None
        examples = [
            Tokenised.of(tokenizer.encode(prompt), [*tokenizer.encode(text), road.end])
            for prompt, text in right
        ]
        kept.append(len(examples))
        if not examples:  # nothing to learn from
            continue
        stage = f"expert-{number + 1}"
        imitate(road, stage, model, examples, max(1, spec.sft_steps // 8))
        model = road.model(stage)
    return {"kept": kept, "stage": stage}


def sampled(
    road: Road, model: GPT, tasks: Sequence[Task], samples: int, *, temperature: float, seed: int
) -> Rollouts:
    """Answers of ``model`` to ``tasks``, ``samples`` to each."""
    return rollout(
        model, [road.tokenizer.encode(text_of(task.prompt)) for task in tasks], max_new_tokens=_NEW_TOKENS,
        params=SamplingParams(temperature=temperature, seed=seed), stop_tokens=[road.end], num_samples=samples,
        vocab_size=road.tokenizer.vocab_size,
    )  # fmt: skip


def answers_of(road: Road, rollouts: Rollouts) -> list[str]:
    """The text of each answer."""
    return [road.tokenizer.decode(rollouts.response(place)) for place in range(len(rollouts))]


def measured(road: Road, model: GPT) -> dict[str, list[int]]:
    """Which held-out prompts ``model`` answers right, greedily and at temperature 1."""
    right = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        rollouts = sampled(road, model, road.tasks.held_out, 1, temperature=temperature, seed=road.spec.seed)
        right[name] = [
            int(arithmetic.reward(task, text))
            for task, text in zip(road.tasks.held_out, answers_of(road, rollouts), strict=True)
        ]
    return right


def best_of(road: Road, model: GPT, reward: RewardModel, count: int) -> list[int]:
    """Which held-out prompts are right where the reward model chooses among ``count`` answers of ``model``."""
    found = best_of_n(
        model, road.prompts(road.tasks.held_out), by_model(reward.scores), count, max_new_tokens=_NEW_TOKENS,
        params=SamplingParams(seed=road.spec.seed + 1), gold=by_answer(arithmetic.reward),
    )  # fmt: skip
    assert found.gold is not None
    return [int(gold[scores.argmax()]) for gold, scores in zip(found.gold, found.scores, strict=True)]


def tokens_of_rankings(spec: RoadSpec) -> int:
    """At most so many tokens is the reward model trained on, if all answers to a prompt differ and are long."""
    return spec.reward_steps * spec.reward_batch * spec.k * 25


def _demonstrated(road: Road) -> list[Tokenised]:
    spec, tokenizer = road.spec, road.tokenizer
    made = arithmetic.demonstrations(road.tasks.train, spec.demonstrations, spec.noise, spec.slips, spec.seed)
    return [
        Tokenised.of(tokenizer.encode(text_of(d.prompt)), [*tokenizer.encode(d.completion), road.end])
        for d in made
    ]


def _whole(tokens: Sequence[int], end: int) -> Tokenised:
    ids = np.array([*tokens, end], np.int32)
    return Tokenised(ids, np.ones(len(ids), bool))
