"""The two ways to mend the start model by its own feedback: its revisions, and PPO on its preferences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from bench.secrets.stages import CONTEXT, NEW_TOKENS, Study, imitate
from gptcore import train as training
from gptcore.align import comparisons, constitution, ppo, reward_model
from gptcore.align.answers import Prompts, by_answer, by_model
from gptcore.align.rankings import tokenised
from gptcore.align.reinforcement_spec import PPOSpec, settings
from gptcore.align.reward_spec import RewardSpec
from gptcore.align.tasks import secrets
from gptcore.data.chat import Chat
from gptcore.data.example_loader import ExampleLoader, Served
from gptcore.data.record_writing import write_demonstrations, write_rankings
from gptcore.data.records import Demonstration, Ranking
from gptcore.errors import UserError

CRITIC, JUDGE = constitution.by_rule(secrets.broken)


def revise(study: Study) -> dict[str, Any]:
    """The start model answers, criticises and revises its answers, and learns the revisions."""
    spec, tasks = study.spec, study.tasks[: study.spec.prompts]
    answers = study.speaker("start", seed=spec.seed + 1)([task.prompt for task in tasks])
    critic, reviser = constitution.asked(study.speaker("start", temperature=0.0))
    revisions = constitution.revise(tasks, answers, secrets.CONSTITUTION, critic, reviser, seed=spec.seed)
    files = [study.place("constitution") / f"{name}.jsonl" for name in ("revisions", "helpful")]
    write_demonstrations(files[0], constitution.demonstrations(revisions))
    write_demonstrations(files[1], helpful(study)[: spec.prompts])
    imitate(study, "constitution", "start", files, spec.revision_steps, spec.revision_lr)
    broken = {
        principle.name: [
            sum(principle in secrets.broken(r.task, r.versions[which]) for r in revisions) for which in (0, -1)
        ]
        for principle in secrets.CONSTITUTION
    }  # fmt: skip
    return {
        "revisions": len(revisions), "changed": sum(len(r.versions) > 1 for r in revisions), "broken": broken,
        "agreement": {
            principle.name: constitution.agreement(
                *(who(tasks, answers, [principle] * len(tasks)) for who in (critic, CRITIC))
            )
            for principle in secrets.CONSTITUTION
        },
        "examples": [[*r.versions] for r in revisions[:4]],
    }  # fmt: skip


def helpful(study: Study) -> list[Demonstration]:
    """Harmless questions with their answers, of those the start model learnt: what both arms are not to forget.

    The paper too learns answers to harmless prompts beside the revisions (Bai et al. 2022, section 3.2).
    """
    tasks = secrets.benign("train", study.spec.harmless, study.spec.seed)
    return [Demonstration(task.prompt, str(task.truth), task="benign") for task in tasks]


def prefer(study: Study) -> dict[str, Any]:
    """The start model answers several times and judges its answers: rankings, and how good its judgement is.

    One answer of each list is another prompt's, so that the reward model learns what does not belong to a question.
    """
    spec, tasks = study.spec, study.tasks[: study.spec.ranked]
    speak = study.speaker("start", seed=spec.seed + 2)
    each = [speak([task.prompt for task in tasks]) for _ in range(spec.samples)]
    others = [each[0][place - 1 - place % 5] for place in range(len(tasks))]
    answers = [list(own) for own in zip(*each, others, strict=True)]
    judge = constitution.asked_to_judge(study.speaker("start", temperature=spec.judge_temperature))
    rankings = constitution.preferences(tasks, answers, secrets.CONSTITUTION, judge, seed=spec.seed)
    if len(rankings) < 2 * spec.reward_batch:
        raise UserError(
            f"secrets: the judge prefers an answer to {len(rankings)} of {len(tasks)} prompts, expected at least "
            f"{2 * spec.reward_batch}; train the start model longer (start_steps)"
        )
    write_rankings(study.place("preferences") / "rankings.jsonl", rankings)
    # The policy's own answers are what scores 0 on average with a deviation of 1: PPO's reward has their scale.
    own = [Demonstration(t.prompt, text) for t, text in zip(tasks, each[0], strict=True) if text.strip()]
    write_demonstrations(study.place("preferences") / "references.jsonl", own[:300])
    by_rule = constitution.preferences(tasks, answers, secrets.CONSTITUTION, JUDGE, seed=spec.seed)
    agreed, pairs = _agreed(rankings, by_rule)
    return {"rankings": len(rankings), "agreed": agreed, "pairs": pairs}


def train_reward_model(study: Study) -> dict[str, Any]:
    """A reward model of the AI's preferences, and how many pairs of the policy's own answers it orders as the
    principles do."""
    spec = study.spec
    data = {"batch": spec.reward_batch, "length": CONTEXT, "held_out": 0.1}
    table = study.settings(
        "reward", spec.reward_steps, spec.reward_lr, start=str(study.place("start")), data=data,
        evaluation={"every": spec.reward_steps},
    )  # fmt: skip
    rankings, references = (
        (str(study.place("preferences") / f"{name}.jsonl"),) for name in ("rankings", "references")
    )
    stage = comparisons.prepare_reward(
        table, RewardSpec(files=rankings, references=references, centring=spec.centring)
    )
    result = comparisons.train(stage, quiet=study.quiet)
    return {"accuracy": result.evaluation["accuracy"], "own": agreement_on(study, "start")}


def agreement_on(study: Study, stage: str) -> dict[str, float | None]:
    """Of pairs of answers of the policy of ``stage`` to held-out prompts, one of which keeps more principles, the share
    that the reward model orders so; None where there is no such pair."""
    spec, (model, _) = study.spec, reward_model.load(study.place("reward"))
    _, chat = study.model("start")
    tasks = [
        *secrets.hostile("held_out", 100, spec.seed + 1),
        *secrets.benign("held_out", 100, spec.seed + 1),
    ]
    speak = study.speaker(stage, seed=spec.seed + 3)
    answers = [list(own) for own in zip(*(speak([t.prompt for t in tasks]) for _ in range(4)), strict=True)]
    by_rule = constitution.preferences(tasks, answers, secrets.CONSTITUTION, JUDGE)
    if not by_rule:
        return {"accuracy": None, "pairs": 0}
    ranked, _ = tokenised(by_rule, chat, length=CONTEXT)
    found = model.losses_of(ranked)
    return {"accuracy": found.accuracy, "pairs": found.pairs}


def reinforce(study: Study) -> dict[str, Any]:
    """PPO on the reward model's scores, from the start model; the principles themselves only watch."""
    spec, (actor, chat) = study.spec, study.model("start")
    model, _ = reward_model.load(study.place("reward"))
    table = {
        "run_dir": str(study.place("ppo")), "steps": spec.iterations, "seed": spec.seed,
        "optimizer": {"lr": spec.ppo_lr}, "checkpoint": {"every": max(1, spec.iterations // 5), "keep_last": 1},
        "ppo": {
            "episodes": spec.episodes, "minibatch": spec.minibatch, "epochs": spec.epochs, "beta": spec.beta,
            "max_new_tokens": NEW_TOKENS, "sample_every": 0, "missing_end_penalty": 1.0,
            "pretraining_coefficient": spec.ptx,
        },
    }  # fmt: skip
    config, own = settings(PPOSpec, table, actor.config)
    prompts = Prompts(study.tasks, chat, room=actor.config.context_length - NEW_TOKENS, seed=spec.seed)
    ppo.run(
        config, own, actor=actor, reference=copy.deepcopy(actor), prompts=prompts, reward=by_model(model.scores),
        gold=by_answer(secrets.reward), quiet=study.quiet, pretraining=_rows(study, chat) if spec.ptx else None,
    )  # fmt: skip
    lines = training.metrics.read(study.place("ppo") / "metrics.jsonl")
    curve = [
        {"kl": line["kl"], "proxy": line["reward"], "gold": line["gold_reward"], "step": line["step"]}
        for line in lines
        if line["kind"] == "train"
    ]
    return {"curve": curve, "own": agreement_on(study, "ppo")}


def _rows(study: Study, chat: Chat) -> ExampleLoader:
    """Batches of :func:`helpful`, for the mix that keeps PPO from forgetting it."""
    spec, tokenizer = study.spec, chat.tokenizer
    served = Served(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.byte_lengths())
    examples = [chat.response(one.prompt, one.completion) for one in helpful(study)]
    return ExampleLoader({"helpful": examples}, served, batch=spec.batch, length=spec.length, seed=spec.seed)


def _agreed(said: Sequence[Ranking], ruled: Sequence[Ranking]) -> tuple[int, int]:
    """Of pairs of answers that a rule does not call equal, how many the AI's ranks order the same way, and of how
    many."""
    by_prompt = {ranking.prompt: dict(zip(ranking.answers, ranking.ranks, strict=True)) for ranking in said}
    agreed = pairs = 0
    for ranking in ruled:
        own = by_prompt.get(ranking.prompt)
        ranked = list(zip(ranking.answers, ranking.ranks, strict=True))
        for number, (first, rank) in enumerate(ranked):
            for second, other in ranked[:number]:
                if rank != other:
                    pairs += 1
                    agreed += own is not None and (own[first] - own[second]) * (rank - other) > 0
    return agreed, pairs
