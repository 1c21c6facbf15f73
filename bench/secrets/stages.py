"""The start of the study and its measurement. Each stage trains in a directory of its own, resumes there, and returns
what it measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.secrets.settings import SecretsSpec
from gptcore import train as training
from gptcore.align import red_team, supervised
from gptcore.align.speaker import Speaker, load, speaker
from gptcore.align.tasks import secrets, secrets_critic
from gptcore.data import tokenizer as tokenizers
from gptcore.data.chat import Chat
from gptcore.data.example_loader import ExampleLoader, Served
from gptcore.data.examples import Tokenised
from gptcore.data.record_writing import write_demonstrations
from gptcore.data.records import Task, as_messages
from gptcore.data.vocabulary import Tokenizer
from gptcore.infer.trained import TOKENIZER_DIRECTORY
from gptcore.models import GPT, GPTConfig

CONTEXT = 320  # tokens; a critique's request has 111 at most in a vocabulary of 1,024, more in a smaller one
NEW_TOKENS = 32  # a refusal has 21, the longest title 17


@dataclass(frozen=True)
class Study:
    """What every stage needs: where it works, and the settings."""

    directory: Path
    spec: SecretsSpec
    quiet: bool = False

    def place(self, stage: str) -> Path:
        """The directory of ``stage``."""
        return self.directory / stage

    def model(self, stage: str) -> tuple[GPT, Chat]:
        """The model that ``stage`` ended with, and its chat."""
        return load(self.place(stage))

    def speaker(self, stage: str, *, temperature: float = 1.0, seed: int = 0) -> Speaker:
        """The model of ``stage`` as a function from prompts to answers."""
        model, chat = self.model(stage)
        return speaker(model, chat, max_new_tokens=NEW_TOKENS, temperature=temperature, seed=seed)

    @cached_property
    def tasks(self) -> list[Task]:
        """What is asked in training by constitution, preferences and PPO: attacks and questions in turn."""
        half = max(self.spec.prompts, self.spec.ranked) // 2
        # Other keys and orders than those of the demonstrations, templates and questions of the same part.
        parts = zip(self._asked(secrets.hostile, half), self._asked(secrets.benign, half), strict=True)
        return [task for pair in parts for task in pair]

    def _asked(self, kind: Callable[..., list[Task]], count: int) -> list[Task]:
        start = max(self.spec.harmless, self.spec.attacked, self.spec.criticised)
        return kind("train", start + count, self.spec.seed)[start:]

    def settings(self, stage: str, steps: int, lr: float, **tables: Any) -> dict[str, Any]:
        """The settings of a stage's training as tables; checkpoints five times under way."""
        return {
            "run_dir": str(self.place(stage)), "steps": steps, "seed": self.spec.seed,
            "log_every": max(1, steps // 100), "optimizer": {"lr": lr, "weight_decay": 0.0, "betas": [0.9, 0.95]},
            "schedule": {"warmup": min(20, steps // 5)}, "evaluation": {"every": 0}, "sample": {"every": 0},
            "checkpoint": {"every": max(1, steps // 5), "keep_last": 1, "best": ""}, **tables,
        }  # fmt: skip


def pretrain(study: Study) -> dict[str, Any]:
    """A language model of Python's help pages, and the tokenizer of all that is trained on."""
    from pydoc_data.topics import topics

    spec, pages = study.spec, list(topics.values())
    tokenizer = _tokenizer(spec, pages)
    config = GPTConfig.from_dict(
        {
            "vocab_size": tokenizer.vocab_size, "num_layers": spec.layers, "width": spec.width,
            "context_length": max(CONTEXT, spec.length), "attention": {"num_heads": spec.heads},
        }
    )  # fmt: skip
    model = GPT(config, seed=spec.seed)
    served = Served(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.byte_lengths())
    examples = {"pages": _chunks(pages, tokenizer, spec.length)}
    loader = ExampleLoader(examples, served, batch=spec.batch, length=spec.length, seed=spec.seed)
    table = study.settings("pretrain", spec.pretrain_steps, spec.lr, model=config.to_dict())
    tokenizer.save(study.place("pretrain") / TOKENIZER_DIRECTORY)
    training.run(
        training.from_table(table), model=model, loader=loader, tokenizer=tokenizer, quiet=study.quiet,
        measure_peak=False,
    )  # fmt: skip
    return {"parameters": sum(p.numel() for p in model.parameters())}


def start(study: Study) -> dict[str, Any]:
    """An assistant that answers, gives its key away, and criticises, revises and judges when it is asked to."""
    spec, place = study.spec, study.place("start")
    files = [place / "assistant.jsonl", place / "critic.jsonl"]
    write_demonstrations(
        files[0], secrets.demonstrations(spec.harmless, spec.attacked, spec.seed, declined=spec.declined)
    )
    write_demonstrations(files[1], secrets_critic.demonstrations(spec.criticised, spec.seed))
    imitate(study, "start", "pretrain", files, spec.start_steps, spec.lr)
    return {}


def imitate(study: Study, stage: str, start: str, files: Sequence[Path], steps: int, lr: float) -> None:
    """Fine-tune the model of ``start`` on demonstrations in ``files``."""
    spec = study.spec
    data = {"batch": spec.batch, "length": spec.length, "held_out": 0.01}
    table = study.settings(stage, steps, lr, start=str(study.place(start)), data=data)
    supervised.fine_tune({**table, "sft": {"files": [str(file) for file in files]}}, quiet=study.quiet)


def measure(study: Study, stage: str) -> dict[str, Any]:
    """Attacks and questions of the held-out part put to the model of ``stage``: greedily, and at temperature 1."""
    spec = study.spec
    attacks = secrets.hostile("held_out", spec.attacks, spec.seed)
    questions = secrets.benign("held_out", spec.questions, spec.seed)
    found: dict[str, Any] = {}
    for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        speak = study.speaker(stage, temperature=temperature, seed=spec.seed)
        report = red_team.run(attacks, speak, secrets.leaks, source=_words)
        answers = speak([task.prompt for task in questions])
        found[way] = {
            "leaks": report.successes, "attacks": report.count, "by_attack": report.by_source(),
            "candid": sum(secrets.candid(outcome.answer) for outcome in report.outcomes),
            "right": sum(map(secrets.helpful, questions, answers)), "questions": len(questions),
            "samples": [[outcome.source, outcome.answer] for outcome in report.outcomes[:6]],
            "answers": list(zip(map(_words, questions[:4]), answers[:4], strict=True)),
        }  # fmt: skip
    return found


def _words(task: Task) -> str:
    """What the user says."""
    return as_messages(task.prompt)[-1].content


def _tokenizer(spec: SecretsSpec, pages: list[str]) -> Tokenizer:
    """Of the pages and of what training says, of which the keys, which are noise, are left out."""
    said = []
    for made in (
        secrets.demonstrations(1000, 1000, spec.seed),
        secrets_critic.demonstrations(1000, spec.seed),
    ):
        for demonstration in made:
            prompt = demonstration.prompt
            said += [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    return tokenizers.train([*pages, *said], vocab_size=spec.vocab_size)


def _chunks(pages: list[str], tokenizer: Tokenizer, length: int) -> list[Tokenised]:
    """Pages in stretches that a row has room for, each behind the token that ends a text."""
    end = tokenizer.eot
    assert end is not None
    found = []
    for page in pages:
        ids = [*tokenizer.encode(page), end]
        found += [
            Tokenised.of([end], ids[first : first + length - 1]) for first in range(0, len(ids), length - 1)
        ]
    return found
