"""Supervised fine-tuning: a pretrained model learns the responses of demonstrations.

The loop is that of training, so a run resumes exactly, keeps checkpoints, recovers and is shared by processes. The
mean of an update is over its response tokens, however it is cut into micro-batches and whoever computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptcore import checkpoint
from gptcore.align.answer_score import exact_match, mean_reward
from gptcore.align.demonstrations import corpus_of, served_by, shares_of, tokenised
from gptcore.align.neftune import EmbeddingNoise
from gptcore.align.supervised_spec import SFTSpec, with_lengths
from gptcore.data import chat as chats
from gptcore.data import chat_template
from gptcore.data.atomic import write_text
from gptcore.data.chat import Chat
from gptcore.data.example_loader import ExampleEvaluation, ExampleLoader
from gptcore.data.records import Demonstration
from gptcore.data.vocabulary import Tokenizer
from gptcore.errors import UserError
from gptcore.infer import generate, trained
from gptcore.models import GPT, AdapterSpec, adapters
from gptcore.models.upcycling import copy_weights
from gptcore.models.vocabulary_growth import grow_vocabulary
from gptcore.train import Result, TrainConfig, held_out, run
from gptcore.train.config import merge

Score = Callable[[GPT, Chat], Mapping[str, float]]
_LONGEST_ROW = 512  # tokens of a row by default, or the model's context where that is shorter
_SHOWN = 2  # held-out prompts that a sample answers


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to run: settings, model with its chat, batches, and what was left out."""

    config: TrainConfig
    spec: SFTSpec
    model: GPT
    chat: Chat
    loader: ExampleLoader
    evaluation: ExampleEvaluation
    held_out: tuple[Demonstration, ...]
    skipped: Mapping[str, int]


def prepare(table: Mapping[str, Any], spec: SFTSpec) -> Stage:
    """Build what the settings name; nothing is written.

    Args:
        table: settings of training, as TOML has them, of which ``start`` names the model to begin with. What is not
            set follows from the model and the size of the data.

    Raises:
        UserError: no model, a tokenizer that is not the model's, data that cannot be read or do not fit.
    """
    table = dict(table)
    model, chat = started(table, spec.template)
    adapted(model, table)
    length = min(_LONGEST_ROW, model.context_length)
    table = merge({"data": {"length": length}}, {**table, "model": model.config.to_dict()})
    settings = with_lengths(table, spec, 1)
    corpus = corpus_of(spec, settings.data.held_out, settings.seed)
    tasks, skipped = {}, corpus.skipped
    for name, learnt in corpus.learnt.items():
        tasks[name], _, left_out = tokenised(learnt, chat, spec, settings.data.length)
        skipped += left_out
        if not tasks[name]:
            raise UserError(f"task {name}: no example is left of {len(learnt)}: {dict(left_out)}")
    rest, records, left_out = tokenised(corpus.held_out, chat, spec, settings.data.length)
    served = served_by(chat)
    loader = ExampleLoader(
        tasks,
        served,
        batch=settings.data.batch,
        length=settings.data.length,
        accumulate=settings.data.accumulate,
        seed=settings.seed,
        packing=spec.packing,
        shares=shares_of(spec, {name: len(examples) for name, examples in tasks.items()}),
    )
    config = with_lengths(table, spec, loader.rows_per_epoch)
    tokens = config.data.batch * config.data.length
    evaluation = ExampleEvaluation(rest, served, tokens=tokens, limit=config.evaluation.batches)
    return Stage(config, spec, model, chat, loader, evaluation, tuple(records), skipped + left_out)


def started(table: Mapping[str, Any], template: str) -> tuple[GPT, Chat]:
    """The model at ``table["start"]`` with the chat of ``template``, its vocabulary grown where that needs tokens.

    With an adapter, which leaves embeddings as they are, no token can be added: "auto" is then "plain" for a vocabulary
    without ChatML's. What ``table["model"]`` has goes before the model's own settings: ``dropout``, say (InstructGPT:
    0.2).

    Raises:
        UserError: no ``start``, no model there, settings that its weights do not fit, a tokenizer other than the one
            that it was trained with.
    """
    start = table.get("start")
    if not isinstance(start, str):
        raise UserError(
            "start: expected the run, checkpoint or Hugging Face directory of the model to begin with"
        )
    data, frozen = table.get("data", {}), table.get("adapter") is not None
    model, tokenizer = trained.load(start, data.get("tokenizer") if isinstance(data, Mapping) else None)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"vocabulary mismatch: the tokenizer has {tokenizer.vocab_size} tokens, the model at {start} "
            f"{model.config.vocab_size}; use the tokenizer that it was trained with"
        )
    if adapters.names(model):
        adapters.absorb(model)
    if template == "auto":
        place = trained.tokenizer_place(start)
        own = chat_template.is_there(place)
        template = str(place) if own else "plain" if frozen and _lacks_chatml(tokenizer) else "chatml"
    chat = chats.chat_for(tokenizer, template)
    model = _changed(model, table.get("model", {}))
    if chat.tokenizer.vocab_size > tokenizer.vocab_size:
        if frozen:
            raise UserError(
                f"template '{template}' needs tokens that the vocabulary lacks, and an adapter trains no embeddings: "
                "the model could not tell them apart, nor learn to stop; take the template plain or none"
            )
        model = grow_vocabulary(model, tokenizer.vocab_size, chat.tokenizer.vocab_size)
    return model, chat


def _changed(model: GPT, settings: Mapping[str, Any]) -> GPT:
    """``model`` with some of its settings changed, and its weights."""
    config = model.config.merged({"vocab_size": model.config.vocab_size, **settings})
    if config == model.config:
        return model
    weight = model.token_embedding.weight
    changed = GPT(config, dtype=weight.dtype, device=weight.device).train(model.training)
    copy_weights(model, changed)
    return changed


def adapted(model: GPT, table: dict[str, Any]) -> None:
    """Put the adapter of ``table``, which leaves it, on ``model``, if there is one: it alone then trains."""
    values = table.pop("adapter", None)
    if values is not None:
        adapters.put_on(model, AdapterSpec.from_dict(values), seed=int(table.get("seed", 1337)))


def train(stage: Stage, *, score: Score | None = None, quiet: bool = False, writes: bool = True) -> Result:
    """Run a stage, or continue it.

    Args:
        score: further numbers of an evaluation, such as a reward model's mean score on the model's answers, for
            ``checkpoint.best`` to choose by.
        writes: keep tokenizer and template with the run; of several processes the first one does.

    Raises:
        UserError: a run to continue that was begun with other examples. Otherwise as :func:`gptcore.train.run`.
    """
    _refuse_other_examples(stage)
    if writes:
        write_text(_digest_place(stage), stage.loader.state()["examples"] + "\n")
        chats.save(stage.chat, Path(stage.config.run_dir) / trained.TOKENIZER_DIRECTORY)
    with EmbeddingNoise(stage.model, stage.spec.neftune_alpha):
        return run(
            stage.config,
            model=stage.model,
            loader=stage.loader,
            evaluate=_evaluate(stage, score),
            sample=_sample(stage),
            tokenizer=stage.chat.tokenizer,
            measure_peak=not quiet,
            quiet=quiet,
        )


def _refuse_other_examples(stage: Stage) -> None:
    """A run goes on with the examples that it began with: bit for bit, whatever file or template has changed."""
    place = _digest_place(stage)
    if not checkpoint.steps(place.parent / "checkpoints") or not place.is_file():
        return
    if place.read_text().strip() != stage.loader.state()["examples"]:
        raise UserError(
            f"{stage.config.run_dir} was begun with other examples: a file, the template or its date has changed; "
            "restore it, or choose another run_dir"
        )


def _digest_place(stage: Stage) -> Path:
    return Path(stage.config.run_dir) / "examples.digest"


def fine_tune(table: Mapping[str, Any], *, score: Score | None = None, quiet: bool = False) -> Result:
    """:func:`prepare` and :func:`train` in one: ``table`` has the settings of training and, in ``sft``, ours."""
    table = dict(table)
    spec = SFTSpec.from_dict(table.pop("sft", {}))
    return train(prepare(table, spec), score=score, quiet=quiet)


def _evaluate(stage: Stage, score: Score | None) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Held-out loss in nats per response token, bits per byte of the responses, and the scores."""
    loss = held_out(stage.evaluation, len(stage.evaluation))
    asked = stage.held_out[: stage.spec.answers]
    scores: list[Score] = [exact_match(asked, stage.spec.answer_tokens)] if asked else []
    if stage.spec.reward_model:
        scores.append(mean_reward(asked, stage.spec.reward_model, stage.spec.answer_tokens))
    scores += [] if score is None else [score]

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        found = loss(model)
        for one in scores:
            found.update(one(model, stage.chat))  # type: ignore[arg-type]
        return found

    return evaluate


def _sample(stage: Stage) -> Callable[[torch.nn.Module], str]:
    """Answers to the first held-out prompts, or to the one of ``sample.prompt``."""
    spec = stage.config.sample
    own = spec.prompt.strip()
    prompts = [own] if own else [record.prompt for record in stage.held_out[:_SHOWN]]

    def sample(model: torch.nn.Module) -> str:
        texts = []
        for prompt in prompts:
            result = generate(
                model,  # type: ignore[arg-type]
                stage.chat.tokenizer,
                stage.chat.prompt_ids(prompt),
                max_new_tokens=spec.tokens,
                temperature=spec.temperature,
                top_k=spec.top_k,
                seed=stage.config.seed,
                end_ids=stage.chat.stop_ids,
                overflow="slide",
            )
            asked = prompt if isinstance(prompt, str) else prompt[-1].content
            texts.append(f"{asked.strip()}\n-> {result.text.strip()}")
        return "\n".join(texts)

    return sample


def _lacks_chatml(tokenizer: Tokenizer) -> bool:
    return any(name not in tokenizer.special_tokens for name in chat_template.CHATML_TOKENS)
