"""What packing saves in fine-tuning: ``python -m bench.packing DATA``, DATA as ``gptcore sft`` takes it.

The same examples go through forward and backward of a small GPT twice, packed into rows by best-fit decreasing, and in
batches padded to their longest, as trainers without packing lay them out (random order, as they do by default). The two
take turns, and each pair of turns gives one ratio of times. Printed: the share of computed tokens that are examples'
own, for the whole of DATA, and of these per second. The ratio of times is that of tokens per second: both turns
compute the same ones. ``cpu_ratio`` is of the process's CPU time, which a busy neighbour disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from gptcore.data import tokenizer
from gptcore.data.best_fit import best_fit_decreasing
from gptcore.data.chat import chat_for
from gptcore.data.examples import Tokenised, lay_out
from gptcore.data.packing import IGNORE
from gptcore.data.record_files import read
from gptcore.data.records import Demonstration
from gptcore.models import GPT, GPTConfig

MODEL = {"num_layers": 4, "width": 256, "attention": {"num_heads": 4}}
BATCH = 8  # examples of a padded batch


def examples_of(path: str, vocabulary: str, length: int, limit: int) -> tuple[list[Tokenised], int]:
    """Examples that fit ``length``, in random order, and the size of the vocabulary."""
    chat = chat_for(tokenizer.load(vocabulary))
    made = [chat.demonstration(record) for record in read(path, Demonstration, limit=limit or None)]
    fitting = [example for example in made if len(example.tokens) - 1 <= length]
    order = np.random.default_rng(0).permutation(len(fitting))
    return [fitting[place] for place in order], chat.tokenizer.vocab_size


def padded(examples: Sequence[Tokenised]) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and targets (B, T) of examples, filled up to the longest."""
    longest = max(len(example.tokens) for example in examples) - 1
    tokens = np.zeros((len(examples), longest), np.int64)
    targets = np.full((len(examples), longest), IGNORE, np.int64)
    for row, example in enumerate(examples):
        size = len(example.tokens) - 1
        tokens[row, :size] = example.tokens[:-1]
        targets[row, :size] = np.where(example.loss_mask[1:], example.tokens[1:], IGNORE)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def padded_step(model: GPT, examples: Sequence[Tokenised]) -> None:
    for first in range(0, len(examples), BATCH):
        model(*padded(examples[first : first + BATCH])).loss.backward()
    model.zero_grad()


def packed_step(model: GPT, examples: Sequence[Tokenised], length: int) -> None:
    lengths = np.array([len(example.tokens) - 1 for example in examples])
    for places in best_fit_decreasing(lengths, length):
        row = lay_out([examples[place] for place in places])
        tokens, targets, bounds = map(torch.from_numpy, (row.tokens, row.targets, row.cu_seqlens))
        model(tokens, targets, cu_seqlens=bounds).loss.backward()
    model.zero_grad()


def shares(examples: Sequence[Tokenised], length: int) -> dict[str, float]:
    """Tokens of examples among those computed: padded to the longest of a batch, padded to rows, packed into rows."""
    lengths = np.array([len(example.tokens) - 1 for example in examples])
    batches = [lengths[first : first + BATCH] for first in range(0, len(lengths), BATCH)]
    return {
        "padded_to_longest": float(lengths.sum() / sum(len(batch) * batch.max() for batch in batches)),
        "padded_to_length": float(lengths.sum() / (len(lengths) * length)),
        "rows_filled": float(lengths.sum() / (len(best_fit_decreasing(lengths, length)) * length)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--tokenizer", default="bytes", help="as gptcore takes it (bytes)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row (1024)")
    parser.add_argument("--examples", type=int, default=64, help="of a turn (64)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of turns (7)")
    args = parser.parse_args()
    examples, vocabulary = examples_of(args.data, args.tokenizer, args.length, 0)
    table = {**MODEL, "vocab_size": vocabulary, "context_length": args.length}
    model = GPT(GPTConfig.from_dict(table), seed=0).train()
    some, ratios, cpu_ratios, seconds = examples[: args.examples], [], [], {True: [], False: []}
    tokens = sum(len(example.tokens) - 1 for example in some)
    for pair in range(args.pairs + 1):
        times, cpu_times = {}, {}
        for packed in (True, False) if pair % 2 else (False, True):
            start, cpu_start = time.perf_counter(), time.process_time()
            packed_step(model, some, args.length) if packed else padded_step(model, some)
            times[packed] = time.perf_counter() - start
            cpu_times[packed] = time.process_time() - cpu_start
        if pair:  # the first warms up
            ratios.append(times[False] / times[True])
            cpu_ratios.append(cpu_times[False] / cpu_times[True])
            for packed, took in times.items():
                seconds[packed].append(took)
    record = {
        "case": "packing", "data": args.data, "length": args.length, "examples": len(examples),
        "threads": torch.get_num_threads(), **shares(examples, args.length),
        "packed_tokens_per_s": tokens / statistics.median(seconds[True]),
        "padded_tokens_per_s": tokens / statistics.median(seconds[False]),
        "ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)],
        "cpu_ratio": statistics.median(cpu_ratios), "cpu_spread": [min(cpu_ratios), max(cpu_ratios)],
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
