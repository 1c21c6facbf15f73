"""Builds what a run needs from its settings, data, tokenizer, model and loader, and trains.

Here all floors meet: only the command line knows them all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    import torch

    from gptcore.data.dataset import TokenDataset
    from gptcore.data.vocabulary import Tokenizer
    from gptcore.dist import Member
    from gptcore.models import GPT
    from gptcore.train import Result, TrainConfig


@dataclass(frozen=True)
class Data:
    """A tokenizer and the two parts of a text that it was applied to."""

    tokenizer: Tokenizer
    train: TokenDataset
    held_out: TokenDataset


def processes_of(table: Mapping[str, Any]) -> AbstractContextManager[Member]:
    """This process's place among those that torchrun started, as settings that are not complete yet say."""
    from gptcore.train import processes
    from gptcore.train.config import ParallelSpec

    timeout = ParallelSpec.from_dict(table.get("parallel", {})).timeout
    return processes.started(str(table.get("device", "cpu")), timeout)


def train(config: TrainConfig, *, quiet: bool = False, member: Member | None = None) -> Result:
    """Prepare the data if need be, build the model and train it as ``config`` says, or continue the run.

    ``member``: this process among those that share the run; rank 0 prepares the data.

    Raises UserError for settings and data that don't fit.
    """
    from gptcore import checkpoint
    from gptcore import train as training
    from gptcore.data.loader import Loader
    from gptcore.dist import Member
    from gptcore.infer.trained import TOKENIZER_DIRECTORY
    from gptcore.models import GPT
    from gptcore.train import processes

    member = Member(None, 0, 1) if member is None else member
    opened: list[Data] = []
    processes.first_alone(member, lambda: opened.append(open_data(config, quiet=quiet)))
    data = opened[0] if opened else open_data(config, quiet=quiet, prepared=True)
    spec = config.data
    loader = Loader(data.train, spec.batch, spec.length, config.seed, mode=spec.mode, documents=spec.packed)
    model = GPT(config.model_config(data.tokenizer.vocab_size), seed=config.seed)
    if config.start and not checkpoint.steps(Path(config.run_dir) / "checkpoints"):
        _start(config.start, model, data.tokenizer)
    if member.rank == 0:
        data.tokenizer.save(Path(config.run_dir) / TOKENIZER_DIRECTORY)
    return training.run(
        config,
        model=model,
        loader=loader,
        evaluate=held_out_loss(config, data),
        sample=sampler(config, data.tokenizer),
        tokenizer=data.tokenizer,
        measure_peak=not quiet,  # takes a second, for a figure that only the progress line shows
        quiet=quiet,
    )


def _start(start: str, model: GPT, tokenizer: Tokenizer) -> None:
    """Give ``model`` the weights of the one at ``start``, which must have been trained with ``tokenizer``."""
    from gptcore.data import tokenizer as tokenizers
    from gptcore.infer import trained
    from gptcore.models.upcycling import copy_weights

    source, own = trained.load(start)
    tokenizers.require_same(own.fingerprint, start, tokenizer.fingerprint, "the data")
    copy_weights(source, model)


def kept_settings(run_dir: str | Path) -> TrainConfig:
    """The settings that a run was started with. Raises UserError where there is no run."""
    from gptcore.train import from_table

    path = Path(run_dir) / "config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no run to continue at {run_dir}; start one with 'gptcore train'") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return from_table({**table, "run_dir": str(run_dir)})


def refuse_changed_settings(config: TrainConfig) -> None:
    """Keep a run's checkpoints from being continued, by mistake, with other data or settings."""
    from gptcore.train.state import changes

    if not (Path(config.run_dir) / "config.json").is_file():
        return
    changed = changes(kept_settings(config.run_dir).to_dict(), config.to_dict())
    if changed:
        raise UserError(
            f"{config.run_dir} holds a run with other settings ({', '.join(changed)}); choose another "
            f"--out, or continue that run with 'gptcore train --resume {config.run_dir}'"
        )


def open_data(config: TrainConfig, *, quiet: bool = False, prepared: bool = False) -> Data:
    """Prepared data as it is; text is prepared first, into the run's directory.

    ``prepared``: another process has done that.
    """
    from gptcore.data import tokenizer as tokenizers
    from gptcore.data.dataset import MANIFEST, TokenDataset

    paths = [config.data.path] if isinstance(config.data.path, str) else list(config.data.path)
    directory = Path(paths[0])
    if len(paths) > 1 or not (directory / MANIFEST).is_file():
        directory = _prepared(config, paths, quiet, prepared)
    elif config.data.tokenizer is not None:
        wanted, own = tokenizers.load(config.data.tokenizer), tokenizers.load(directory)
        tokenizers.require_same(
            own.fingerprint,
            f"the data in {directory}",
            wanted.fingerprint,
            f"data.tokenizer {config.data.tokenizer}",
        )
    return Data(
        tokenizers.load(directory), TokenDataset.open(directory, "train"), TokenDataset.open(directory, "val")
    )


def _prepared(config: TrainConfig, paths: list[str], quiet: bool, prepared: bool) -> Path:
    """The run's own data directory, made now unless the run has started already."""
    from gptcore.data.dataset import MANIFEST
    from gptcore.data.prepare import prepare

    directory = Path(config.run_dir) / "data"
    started = prepared or (Path(config.run_dir) / "config.json").is_file()
    if not (started and (directory / MANIFEST).is_file()):
        prepare(
            paths,
            directory,
            tokenizer=config.data.tokenizer or "bpe",
            vocab_size=config.data.vocab_size,
            val_fraction=config.data.held_out,
            overwrite=True,
            quiet=quiet,
        )
    return directory


def held_out_loss(config: TrainConfig, data: Data) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Loss in nats per token and bits per byte, over the same held-out batches every time."""
    from gptcore.data.loader import Evaluation
    from gptcore.train import held_out

    spec = config.data
    batches = Evaluation(
        data.held_out, spec.batch, spec.length, documents=spec.packed, limit=config.evaluation.batches
    )
    return held_out(batches, len(batches))


def sampler(config: TrainConfig, tokenizer: Tokenizer) -> Callable[[torch.nn.Module], str]:
    """Writes the text that ``config.sample`` asks for."""
    from gptcore.infer import generate

    spec = config.sample

    def sample(model: torch.nn.Module) -> str:
        result = generate(
            model,  # type: ignore[arg-type]
            tokenizer,
            spec.prompt,
            max_new_tokens=spec.tokens,
            temperature=spec.temperature,
            top_k=spec.top_k,
            seed=config.seed,
            overflow="slide",
        )
        return spec.prompt + result.text

    return sample
