"""What the verbs ``ppo``, ``grpo`` and ``expert-iteration`` share: arguments, and the run they make."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.align.answers import Reward
    from gptcore.align.critic import Critic
    from gptcore.align.ppo import Result
    from gptcore.align.reinforcement_spec import PPOSpec
    from gptcore.align.reward_model import RewardModel
    from gptcore.align.task_sources import Source
    from gptcore.cli.pipeline import Data
    from gptcore.data.chat import Chat
    from gptcore.data.loader import Loader
    from gptcore.data.vocabulary import Tokenizer
    from gptcore.models import GPT
    from gptcore.train import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all three."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a run, checkpoint or Hugging Face directory to start from"
    )
    parser.add_argument(
        "tasks", nargs="*", metavar="TASKS", help="a built-in task, or files of prompts (JSONL, Parquet)"
    )
    parser.add_argument("--reward", metavar="WHAT", help="task, exact, FILE.py:FUNCTION or a reward model")
    parser.add_argument("--gold", metavar="WHAT", help="a second judge, which is only logged")
    parser.add_argument("--reference", metavar="MODEL", help="what not to drift from (MODEL itself)")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="PATH",
        help="pretraining text for pretraining_coefficient",
    )
    parser.add_argument("--config", metavar="FILE", help="settings as TOML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting")
    parser.add_argument("--out", metavar="DIR", help="directory of the run")
    parser.add_argument("--steps", type=int, metavar="N", help="iterations (100)")
    parser.add_argument(
        "--zero", type=int, choices=(0, 1, 2), help="what torchrun's processes divide, as in train (0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress line")


def run(args: argparse.Namespace, kind: type[PPOSpec], train: Callable[..., Result]) -> int:
    """Read the settings, build what they name, and train."""
    from gptcore.align.task_sources import TasksSpec
    from gptcore.cli import pipeline

    table = _table(args, kind.section)
    asked = TasksSpec.from_dict(table.pop("tasks", {}))
    start = table.get("start")
    if not start:
        raise UserError(
            f"give the model to start from, as in 'gptcore {kind.section.replace('_', '-')} runs/sft'"
        )
    with pipeline.processes_of(table) as member:
        result = _train(args, kind, train, table, asked)
        if member.rank == 0:
            _say(result, Path(table["run_dir"]))
    return 0


def _table(args: argparse.Namespace, section: str) -> dict[str, Any]:
    """The settings that file and arguments add up to, as nested plain values."""
    from gptcore.align import stage_settings

    tasks = {"path": args.tasks or None, "reward": args.reward, "gold": args.gold}
    given: dict[str, Any] = {"start": args.model, "run_dir": args.out, "steps": args.steps}
    given["data"] = {"path": args.text} if args.text else None
    given["parallel"] = None if args.zero is None else {"zero": args.zero}
    given["tasks"] = {name: value for name, value in tasks.items() if value is not None}
    over = {name: value for name, value in given.items() if value is not None}
    table, own = stage_settings.read(section, args.config, args.set, over, more=["tasks"])
    return {"run_dir": f"runs/{section}", **table, section: own}


def _train(
    args: argparse.Namespace,
    kind: type[PPOSpec],
    train: Callable[..., Result],
    table: dict[str, Any],
    asked: Any,
) -> Result:
    from gptcore.align import task_sources
    from gptcore.align.answers import Prompts
    from gptcore.align.held_out_reward import held_out_reward
    from gptcore.align.reinforcement_spec import settings
    from gptcore.infer import trained
    from gptcore.train.loop import DTYPES

    actor, tokenizer = trained.load(table["start"])
    config, spec = settings(kind, table, actor.config)
    if config.threads:
        from gptcore import backend

        backend.set_num_threads(config.threads)
    chat = chat_of(tokenizer, table["start"], asked.template)
    if chat.tokenizer.vocab_size > actor.config.vocab_size:
        raise UserError(
            f"tasks.template: {asked.template} needs tokens that the model has not; fine-tune it with it first, with "
            "'gptcore sft'"
        )
    source = task_sources.tasks_of(asked, config.seed)
    room = actor.config.context_length - spec.max_new_tokens + 1
    prompts = Prompts(source.train, chat, room=room, seed=config.seed)
    reward = judge_of(asked.reward, source, tokenizer, "tasks.reward")
    gold = None if asked.gold is None else judge_of(asked.gold, source, tokenizer, "tasks.gold")
    reference = _reference(args, table["start"], spec, config)
    evaluate = None
    if source.held_out:
        kept = Prompts(source.held_out, chat, room=room)
        evaluate = held_out_reward(
            kept, reward, max_new_tokens=spec.max_new_tokens, params=spec.sampling(config.seed), gold=gold,
            reference=reference,
        )  # fmt: skip
    actor.to(device=config.device, dtype=DTYPES[config.dtype])
    return train(
        config, spec, actor=actor, reference=reference, prompts=prompts,
        reward=reward, gold=gold, evaluate=evaluate, quiet=args.quiet,
        pretraining=_pretraining(config, table, chat) if spec.pretraining_coefficient else None,
        critic=None if asked.critic is None else _critic(asked.critic, tokenizer, spec, config),
    )  # fmt: skip


def judge_of(name: str | None, source: Source, tokenizer: Tokenizer, what: str) -> Reward:
    """The reward that ``name`` means, a reward model's where it is a directory."""
    from gptcore.align import task_sources
    from gptcore.align.answers import by_model

    if name is None or not Path(name).is_dir():
        return task_sources.reward_of(name, source, what)
    return by_model(_reward_model(name, tokenizer).scores)


def _reward_model(path: str, tokenizer: Tokenizer) -> RewardModel:
    """That of the run at ``path``, which must read the policy's tokens."""
    from gptcore.align import reward_model
    from gptcore.data import tokenizer as tokenizers

    model, own = reward_model.load(path)
    tokenizers.require_same(own.fingerprint, path, tokenizer.fingerprint, "the policy")
    return model.eval()


def _critic(path: str, tokenizer: Tokenizer, spec: PPOSpec, config: TrainConfig) -> Critic:
    """A critic that begins as the reward model at ``path``."""
    from gptcore.align.critic import Critic

    if spec.estimator != "gae":
        raise UserError(f"tasks.critic: {spec.estimator} has no critic; leave it out")
    return Critic.of_reward_model(_reward_model(path, tokenizer)).to(config.device)


def chat_of(tokenizer: Any, start: str, template: str | None) -> Chat:
    """The template named, or the one that the model was kept with, or none."""
    from gptcore.data import chat_template
    from gptcore.data.chat import chat_for
    from gptcore.infer import trained

    if template is None:
        place = trained.tokenizer_place(start)
        template = os.fspath(place) if chat_template.is_there(place) else "none"
    return chat_for(tokenizer, template)


def _reference(args: argparse.Namespace, start: str, spec: PPOSpec, config: TrainConfig) -> GPT | None:
    """A frozen copy, where its divergence is wanted."""
    from gptcore.infer import trained
    from gptcore.train.loop import DTYPES

    if not spec.beta and args.reference is None:
        return None
    model, _ = trained.load(args.reference or start)
    return model.to(device=config.device, dtype=DTYPES[config.dtype])


def _pretraining(config: TrainConfig, table: dict[str, Any], chat: Chat) -> Loader:
    """Batches of text, tokenised as the model's."""
    from gptcore.cli import pipeline
    from gptcore.data.loader import Loader
    from gptcore.infer import trained
    from gptcore.train import processes

    place = os.fspath(trained.tokenizer_place(table["start"]))
    with_tokenizer = config.merged({"data": {"tokenizer": place}})
    opened: list[Data] = []
    processes.first_alone(
        processes.member(), lambda: opened.append(pipeline.open_data(with_tokenizer, quiet=True))
    )
    data = opened[0] if opened else pipeline.open_data(with_tokenizer, quiet=True, prepared=True)
    spec = config.data
    return Loader(data.train, spec.batch, spec.length, config.seed, mode=spec.mode, documents=spec.packed)


def _say(result: Result, directory: Path) -> None:
    """What the run came to, and what to do next."""
    seen = {**result.metrics, **result.evaluation}
    names = ("reward", "gold_reward", "kl", "val_reward", "val_reward_greedy", "val_gold_reward", "val_kl")
    numbers = ", ".join(f"{name} {seen[name]:.4f}" for name in names if name in seen)
    print(f"iteration {result.step}: {numbers}")
    print(f"checkpoint: {result.checkpoint}")
    print(f'next: gptcore generate {json.dumps(str(directory))[1:-1]} --prompt "..."')
