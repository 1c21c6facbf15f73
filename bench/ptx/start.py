"""What all arms share: text and tasks, and a model that has read the one and imitated the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.ptx.settings import PtxSpec
from gptcore import train as training
from gptcore.align.answers import Prompts
from gptcore.align.tasks import docstrings
from gptcore.data import byte_bpe
from gptcore.data import tokenizer as tokenizers
from gptcore.data.chat import Chat, chat_for
from gptcore.data.dataset import TokenDataset
from gptcore.data.example_loader import ExampleLoader, Served
from gptcore.data.examples import Tokenised
from gptcore.data.loader import Loader
from gptcore.data.records import Task
from gptcore.data.tokenizer import Tokenizer
from gptcore.infer import trained
from gptcore.infer.trained import TOKENIZER_DIRECTORY
from gptcore.models import GPT, GPTConfig
from gptcore.train.evaluation import Batches, held_out

_HELD_OUT_BATCH = 32  # rows


@dataclass(frozen=True)
class Start:
    """The directory that holds it, and what is read and asked."""

    directory: Path
    spec: PtxSpec

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """A byte-level BPE of the text that is trained on, learnt once and kept in the directory."""
        place = self.directory / TOKENIZER_DIRECTORY
        if not place.is_dir():
            byte_bpe.train_bpe(self._texts("train"), vocab_size=self.spec.vocab_size).save(place)
        return tokenizers.load(place)

    @cached_property
    def chat(self) -> Chat:
        """No template: a prompt is source as it stands in a file."""
        return chat_for(self.tokenizer, "none")

    @property
    def end(self) -> int:
        """The token that ends a file and an answer."""
        assert self.tokenizer.eot is not None
        return self.tokenizer.eot

    @cached_property
    def model_config(self) -> GPTConfig:
        spec = self.spec
        return GPTConfig.from_dict(
            {
                "vocab_size": self.tokenizer.vocab_size, "num_layers": spec.layers, "width": spec.width,
                "context_length": spec.context, "attention": {"num_heads": spec.heads},
            }
        )  # fmt: skip

    def _texts(self, part: docstrings.Part) -> list[str]:
        """Files of a part, shuffled so that a bound leaves some of every package, up to ``text_bytes`` in all."""
        texts = [text for _, text in docstrings.texts(part, seed=self.spec.split_seed) if text]
        order = np.random.default_rng(self.spec.start_seed).permutation(len(texts))
        bound, found = self.spec.text_bytes, list[str]()
        for place in order.tolist():
            found.append(texts[place])
            bound -= len(texts[place])
            if self.spec.text_bytes and bound <= 0:
                break
        return found

    def _tokens(self, part: docstrings.Part) -> TokenDataset:
        ids = [np.array([*self.tokenizer.encode(text), self.end], np.int32) for text in self._texts(part)]
        return TokenDataset.from_array(
            np.concatenate(ids), vocab_size=self.tokenizer.vocab_size, eot=self.end,
            token_bytes=self.tokenizer.byte_lengths(), fingerprint=self.tokenizer.fingerprint,
        )  # fmt: skip

    @cached_property
    def source(self) -> TokenDataset:
        """The source that is trained on."""
        return self._tokens("train")

    def pretraining(self, rows: int, seed: int) -> Batches:
        """Batches of the source that is trained on, in an order drawn from ``seed``."""
        return Loader(self.source, rows, self.spec.context, seed)

    @cached_property
    def bits_per_byte(self) -> Any:
        """model → its bits per byte on source of modules that nothing was trained on."""
        loader = Loader(self._tokens("held_out"), _HELD_OUT_BATCH, self.spec.context, seed=0)
        evaluate = held_out(loader, -(-self.spec.held_out_rows // _HELD_OUT_BATCH))
        return lambda model: {"bits_per_byte": evaluate(model)["val_bits_per_byte"]}

    def prompts(self, part: docstrings.Part, seed: int) -> Prompts:
        """The tasks of a part whose prompts have one of the lengths."""
        tasks = docstrings.tasks(part, seed=self.spec.split_seed)
        lengths = map(len, self.tokenizer.encode_batch([str(task.prompt) for task in tasks]))
        kept = [
            task for task, length in zip(tasks, lengths, strict=True) if length in self.spec.prompt_lengths
        ]
        return Prompts(kept, self.chat, room=self.spec.context - self.spec.max_new_tokens + 1, seed=seed)

    def model(self, stage: str = "sft") -> GPT:
        """The model that ``stage``, pretrain or sft, ended with."""
        return trained.load(self.directory / stage)[0]


def make(start: Start, *, quiet: bool = True) -> None:
    """Train what is not trained yet: pretraining, then imitation of real first lines."""
    spec = start.spec
    loader = start.pretraining(spec.rows, spec.start_seed)
    model = GPT(start.model_config, seed=spec.start_seed)
    _train(start, "pretrain", model, loader, spec.pretrain_steps, spec.lr, quiet)
    served = Served(start.tokenizer.fingerprint, start.tokenizer.vocab_size, start.tokenizer.byte_lengths())
    demonstrated = {"sft": _demonstrated(start, docstrings.tasks("train", seed=spec.split_seed))}
    examples = ExampleLoader(demonstrated, served, batch=spec.rows, length=spec.context, seed=spec.start_seed)
    _train(start, "sft", start.model("pretrain"), examples, spec.sft_steps, spec.sft_lr, quiet)


def _train(start: Start, stage: str, model: GPT, loader: Batches, steps: int, lr: float, quiet: bool) -> None:
    spec = start.spec
    config = training.from_table(
        {
            "run_dir": str(start.directory / stage), "steps": steps, "seed": spec.start_seed,
            "model": start.model_config.to_dict(), "log_every": max(1, steps // 50),
            "data": {"batch": spec.rows, "length": spec.context},
            "optimizer": {"lr": lr, "weight_decay": 0.0, "betas": [0.9, 0.95]},
            "schedule": {"name": "cosine", "warmup": min(50, steps // 5)},
            "evaluation": {"every": 0}, "checkpoint": {"every": max(1, steps // 4), "keep_last": 1},
        }
    )  # fmt: skip
    start.tokenizer.save(Path(config.run_dir) / TOKENIZER_DIRECTORY)
    training.run(
        config, model=model, loader=loader, tokenizer=start.tokenizer, quiet=quiet, measure_peak=False
    )


def _demonstrated(start: Start, tasks: Sequence[Task]) -> list[Tokenised]:
    """Real first lines after their signatures, those that fit into a row."""
    made = docstrings.demonstrations(tasks)
    prompts = start.tokenizer.encode_batch([str(d.prompt) for d in made])
    answers = start.tokenizer.encode_batch([d.completion for d in made])
    examples = [Tokenised.of(p, [*a, start.end]) for p, a in zip(prompts, answers, strict=True)]
    return [example for example in examples if len(example.tokens) <= start.spec.context + 1]
