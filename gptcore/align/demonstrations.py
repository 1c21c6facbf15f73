"""Demonstrations on their way to a loader: read by task, held out in part, made tokens, fitted to a row."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gptcore.align.supervised_spec import SFTSpec
from gptcore.data.chat import Chat
from gptcore.data.example_loader import Served, examples_proportional
from gptcore.data.examples import Tokenised
from gptcore.data.permutation import derive, permute
from gptcore.data.record_files import read
from gptcore.data.records import Demonstration
from gptcore.errors import UserError

_PLACE_OF_HELD_OUT = 5  # so that it draws numbers unrelated to the loader's


@dataclass
class Corpus:
    """Demonstrations by task, to learn and held out; ``skipped`` counts what was left out, by reason."""

    learnt: dict[str, list[Demonstration]] = field(default_factory=dict)
    held_out: list[Demonstration] = field(default_factory=list)
    skipped: collections.Counter[str] = field(default_factory=collections.Counter)


def corpus_of(spec: SFTSpec, held_out: float, seed: int) -> Corpus:
    """What ``spec`` names, of which the share ``held_out`` of each task, at least one demonstration, is not learnt.

    Raises:
        UserError: no files, files that cannot be read, a task of one demonstration and nothing else held out.
    """
    if not spec.all_tasks:
        raise UserError("sft.files: got none, expected the files of demonstrations")
    corpus = Corpus()
    for task in spec.all_tasks:
        found = read(task.files, Demonstration, format=task.format, fields=task.fields, bad=spec.bad)
        corpus.skipped.update(found.skipped)
        records = [replace(record, task=task.name) for record in found]
        if not spec.held_out_files:
            records, rest = _divided(records, held_out, derive(seed, _PLACE_OF_HELD_OUT), task.name)
            corpus.held_out += rest
        corpus.learnt[task.name] = records
    if spec.held_out_files:
        kept = read(spec.held_out_files, Demonstration, format=spec.format, fields=spec.fields, bad=spec.bad)
        corpus.held_out, corpus.skipped = kept.records, corpus.skipped + kept.skipped
    return corpus


def shares_of(spec: SFTSpec, sizes: Mapping[str, int]) -> dict[str, float] | None:
    """The share of each task; None where each example counts alike.

    Weights, where given, go before proportions; then the tasks that reason get their share together.
    """
    tasks = {task.name: task for task in spec.all_tasks}
    weighted = [name for name, task in tasks.items() if task.weight is not None]
    if not (weighted or spec.mixture_cap or spec.chain_of_thought is not None):
        return None
    if weighted and len(weighted) < len(tasks):
        missing = next(name for name in tasks if name not in weighted)
        raise UserError(f"sft.tasks: {missing} has no weight, others have; expected one for each or for none")
    shares = examples_proportional(sizes, spec.mixture_cap)
    if weighted:
        whole = sum(task.weight or 0.0 for task in tasks.values())
        shares = {name: (task.weight or 0.0) / whole for name, task in tasks.items()}
    if spec.chain_of_thought is None:
        return shares
    reasoning = sum(share for name, share in shares.items() if tasks[name].chain_of_thought)
    if not 0.0 < reasoning < 1.0:
        kind = "no task" if reasoning == 0.0 else "every task"
        raise UserError(
            f"sft.chain_of_thought: {kind} has chain_of_thought = true, expected some of both kinds"
        )
    wanted = {
        True: spec.chain_of_thought / reasoning,
        False: (1.0 - spec.chain_of_thought) / (1.0 - reasoning),
    }
    return {name: share * wanted[tasks[name].chain_of_thought] for name, share in shares.items()}


def tokenised(
    records: Sequence[Demonstration], chat: Chat, spec: SFTSpec, length: int
) -> tuple[list[Tokenised], list[Demonstration], collections.Counter[str]]:
    """Examples of at most ``length`` + 1 tokens, whose last one is no input, as ``spec.overflow`` says.

    Returns:
        The examples, the records they are of, and how many were left out by reason.

    Raises:
        UserError: a record that the template cannot say, an example that is too long: names file and line.
    """
    examples: list[Tokenised] = []
    kept: list[Demonstration] = []
    skipped: collections.Counter[str] = collections.Counter()
    too_long: list[str] = []
    for record in records:
        try:
            example = chat.demonstration(record, spec.turns)
        except UserError as error:
            raise UserError(f"{record.origin}: {error}" if record.origin else str(error)) from None
        fitted = fit(example, length, spec.overflow)
        if fitted is not None:
            examples.append(fitted)
            kept.append(record)
        elif spec.overflow == "refuse":
            too_long.append(_told(record, example, length))
        else:
            skipped[f"longer than {length} tokens"] += 1
    if too_long:
        raise UserError(
            f"{len(too_long)} of {len(records)} examples are longer than a row of {length} tokens, the first one: "
            f"{too_long[0]}; set data.length, or sft.overflow to skip, truncate or truncate_prompt"
        )
    return examples, kept, skipped


def fit(example: Tokenised, length: int, overflow: str) -> Tokenised | None:
    """``example`` with at most ``length`` + 1 tokens, or None where that leaves nothing to learn.

    ``overflow``: "truncate" cuts the end, with it the stop token; "truncate_prompt" cuts the beginning, but nothing of
    what is to be learnt; anything else cuts nothing.
    """
    if len(example.tokens) <= length + 1:
        return example
    if overflow == "truncate":
        cut = example._replace(tokens=example.tokens[: length + 1], loss_mask=example.loss_mask[: length + 1])
        return cut if cut.targets else None
    start = len(example.tokens) - (length + 1)
    if overflow != "truncate_prompt" or example.loss_mask[: start + 1].any():
        return None
    return example._replace(tokens=example.tokens[start:], loss_mask=example.loss_mask[start:])


def served_by(chat: Chat) -> Served:
    """What a loader tells of the tokenizer."""
    tokenizer = chat.tokenizer
    return Served(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.byte_lengths())


def _divided(
    records: list[Demonstration], share: float, key: int, task: str
) -> tuple[list[Demonstration], list[Demonstration]]:
    """``records`` in their order, without the share that a shuffle takes out, and that."""
    if len(records) < 2:
        raise UserError(f"task {task} has 1 demonstration, expected 2 or more, since some are held out")
    count = min(max(1, round(share * len(records))), len(records) - 1)
    out = set(permute(np.arange(count), len(records), key).tolist())
    return (
        [record for place, record in enumerate(records) if place not in out],
        [record for place, record in enumerate(records) if place in out],
    )


def _told(record: Demonstration, example: Tokenised, length: int) -> str:
    prompt = int(np.argmax(example.loss_mask))
    alone = f", of which the prompt alone has {prompt}" if prompt > length else ""
    return f"{record.origin or 'an example'} with {len(example.tokens)} tokens{alone}"
