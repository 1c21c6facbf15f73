"""A set of instructions that a small trained model grows from a few: ``python -m bench self-instruct``.

The instructions are first lines of docstrings of this Python's library ("Return a list of all threads."). A GPT is
trained on lists of those of most modules; the seeds are of modules that it never saw. It is shown some of the set,
continues the list, and what it writes enters the set unless a filter says why not (Wang et al. 2022, section 2.2);
lines of its training text are refused as not its own. Told are the growth by rounds and the rejects by reason.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gptcore import train as training
from gptcore.align import self_instruct
from gptcore.align.self_instruct import Filter, Grown, items_of, listed
from gptcore.align.speaker import speaker
from gptcore.align.tasks import docstrings
from gptcore.data import tokenizer as tokenizers
from gptcore.data.atomic import write_text
from gptcore.data.chat import chat_for
from gptcore.data.example_loader import ExampleLoader, Served
from gptcore.data.examples import Tokenised
from gptcore.errors import UserError
from gptcore.infer import trained
from gptcore.infer.trained import TOKENIZER_DIRECTORY
from gptcore.models import GPT, GPTConfig
from gptcore.models.schema import Spec, at_least
from gptcore.report.html import Page
from gptcore.report.plot import Panel, Series
from gptcore.train.config import merge, override

EXAMPLES = """examples:
  python -m bench self-instruct                       the study, into runs/self-instruct
  python -m bench self-instruct --toy --out /tmp/toy  is it all in place? numbers of no worth
The last line of the output is one JSON object. A training that was stopped goes on from its checkpoint.
"""
_SHOWN = 8  # instructions in a prompt (Wang et al., section 2.2)


@dataclass(frozen=True)
class SelfInstructSpec(Spec):
    """The model (``vocab_size``, ``layers``, ``width``, ``heads``) learns ``lists`` of ``per_list`` lines for ``steps``
    updates of ``batch`` rows of ``length`` tokens at ``lr``; the set of ``seeds`` grows to ``count`` more, in at most
    ``rounds`` of ``tokens`` each, sampled at ``temperature``."""

    section: ClassVar[str] = "self_instruct"

    seed: int = 1
    vocab_size: int = 1024
    layers: int = 3
    width: int = 96
    heads: int = 4
    lists: int = 2500
    per_list: int = 12
    length: int = 256
    batch: int = 8
    steps: int = 500
    lr: float = 2e-3
    seeds: int = 175
    count: int = 200
    rounds: int = 150
    tokens: int = 64
    temperature: float = 0.8

    def validate(self) -> None:
        at_least(
            "self_instruct.", 1, layers=self.layers, width=self.width, heads=self.heads, lists=self.lists,
            batch=self.batch, steps=self.steps, seeds=self.seeds, count=self.count, rounds=self.rounds,
            tokens=self.tokens,
        )  # fmt: skip
        at_least("self_instruct.", _SHOWN, per_list=self.per_list)
        at_least("self_instruct.", 300, vocab_size=self.vocab_size)
        at_least("self_instruct.", 0, seed=self.seed)


TOY = {
    "vocab_size": 400, "layers": 1, "width": 32, "heads": 2, "lists": 60, "length": 400, "steps": 60, "batch": 2,
    "count": 10, "rounds": 4, "tokens": 40,
}  # fmt: skip


def lines_of(part: docstrings.Part) -> list[str]:
    """Instructions of the modules of one part: sentences of 3 to 14 words, each once."""
    held_out = part == "held_out"
    lines = [f.line for f in docstrings.functions() if docstrings.is_held_out(f.module, 0.15) == held_out]
    return [line for line in dict.fromkeys(lines) if line.endswith(".") and 3 <= len(line.split()) <= 14]


def train(directory: Path, spec: SelfInstructSpec, lines: Sequence[str], *, quiet: bool = False) -> None:
    """A GPT of lists of ``lines``, into ``directory``."""
    drawn = random.Random(f"self-instruct lists {spec.seed}")
    texts = []
    for _ in range(spec.lists):
        chosen = drawn.sample(lines, spec.per_list)
        texts.append(f"{listed(chosen[:-1])} {chosen[-1]}")
    tokenizer = tokenizers.train(texts, vocab_size=spec.vocab_size)
    end = tokenizer.eot
    assert end is not None
    encoded = [[*tokenizer.encode(text), end] for text in texts]
    examples = [Tokenised.of(ids[:1], ids[1:]) for ids in encoded if len(ids) <= spec.length]
    config = GPTConfig.from_dict(
        {
            "vocab_size": tokenizer.vocab_size, "num_layers": spec.layers, "width": spec.width,
            "context_length": spec.length + spec.tokens, "attention": {"num_heads": spec.heads},
        }
    )  # fmt: skip
    table = {
        "run_dir": str(directory), "steps": spec.steps, "seed": spec.seed, "model": config.to_dict(),
        "optimizer": {"lr": spec.lr, "betas": [0.9, 0.95]}, "schedule": {"warmup": min(20, spec.steps // 5)},
        "evaluation": {"every": 0}, "checkpoint": {"every": max(1, spec.steps // 5), "keep_last": 1},
    }  # fmt: skip
    served = Served(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.byte_lengths())
    loader = ExampleLoader({"lists": examples}, served, batch=spec.batch, length=spec.length, seed=spec.seed)
    tokenizer.save(directory / TOKENIZER_DIRECTORY)
    training.run(
        training.from_table(table), model=GPT(config, seed=spec.seed), loader=loader, tokenizer=tokenizer,
        quiet=quiet, measure_peak=False,
    )  # fmt: skip


def grow(directory: Path, spec: SelfInstructSpec, seeds: Sequence[str], known: Sequence[str]) -> Grown:
    """What the model in ``directory`` adds to ``seeds``; of ``known``, its training text, nothing counts."""
    model, tokenizer = trained.load(directory)
    chat = chat_for(tokenizer, "none")
    speak = speaker(model, chat, max_new_tokens=spec.tokens, temperature=spec.temperature, seed=spec.seed)
    seen = set(known)

    def propose(examples: Sequence[str]) -> list[str]:
        said = speak([listed(examples)])[0]
        ended, newline, _ = said.rpartition("\n")  # the last line was cut, unless the list had ended
        return items_of(ended if newline else said)

    own = Filter(longest=20, accepts=lambda text: text not in seen)
    return self_instruct.grow(
        seeds, propose, spec.count, shown=_SHOWN, most_rounds=spec.rounds, filter=own, seed=spec.seed
    )


def record(spec: SelfInstructSpec, seeds: Sequence[str], grown: Grown) -> dict[str, Any]:
    """What came of it, fit for one line of JSON."""
    return {
        "case": "self_instruct", "seeds": len(seeds), "kept": len(grown.kept), "rounds": grown.rounds,
        "proposed": len(grown.kept) + sum(grown.rejected.values()), "rejected": dict(sorted(grown.rejected.items())),
        "growth": grown.growth, "examples": grown.kept[:8], "settings": spec.to_dict(),
    }  # fmt: skip


def page(spec: SelfInstructSpec, seeds: Sequence[str], grown: Grown) -> Page:
    """The report with the curve of growth."""
    made = Page(
        "A set of instructions grown by a small model", subtitle=f"{len(seeds)} seeds, {len(grown.kept)} kept"
    )
    made.section("Growth")
    points = [(float(number), float(size)) for number, size in enumerate(grown.growth, 1)]
    made.panels(
        [Panel("instructions kept", [Series("kept", points)])],
        x_label="round",
        caption="growth of the set by rounds",
    )
    made.section("Rejects")
    made.table(
        ["reason", "rejected", "for example"],
        [
            [reason, count, next(text for why, text in grown.rejects if why == reason)]
            for reason, count in grown.rejected.most_common()
        ],
    )  # fmt: skip
    made.section("Kept")
    made.sample("\n".join(grown.kept[:40]), "the first that entered")
    made.sample("\n".join(seeds[:10]), "some of the seeds")
    made.settings(spec.to_dict())
    return made


def run(directory: Path, spec: SelfInstructSpec, *, quiet: bool = False) -> dict[str, Any]:
    """Train, grow, and write ``report.html`` and ``grown.jsonl`` into ``directory``; returns the record."""
    learnt, rest = lines_of("train"), lines_of("held_out")
    seeds = random.Random(f"self-instruct seeds {spec.seed}").sample(rest, min(spec.seeds, len(rest)))
    train(directory / "model", spec, learnt, quiet=quiet)
    grown = grow(directory / "model", spec, seeds, learnt)
    write_text(directory / "grown.jsonl", "".join(f"{json.dumps({'instruction': t})}\n" for t in grown.kept))
    page(spec, seeds, grown).write(directory / "report.html")
    return record(spec, seeds, grown)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the set grew, 1 when it did not, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m bench self-instruct", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", default="runs/self-instruct", metavar="DIR", help="(runs/self-instruct)")
    add("--toy", action="store_true", help="a toy size, to see that everything runs")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, such as count=50")
    add("--json", metavar="FILE", help="also write the record to FILE")
    add("--quiet", action="store_true", help="no progress lines")
    arguments = parser.parse_args(argv)
    settings: dict[str, object] = dict(TOY if arguments.toy else {})
    try:
        for text in arguments.set:
            settings = merge(settings, override(text))
        found = run(Path(arguments.out), SelfInstructSpec.from_dict(settings), quiet=arguments.quiet)
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    told = ", ".join(f"{reason} {count}" for reason, count in found["rejected"].items()) or "none"
    print(
        f"{found['seeds']} seeds grew by {found['kept']} of {found['proposed']} proposed in {found['rounds']} rounds"
    )
    print(f"rejected: {told}\nreport: {Path(arguments.out) / 'report.html'}")
    if arguments.json:
        write_text(Path(arguments.json), json.dumps(found) + "\n")
    print(json.dumps(found))
    return 0 if found["kept"] else 1
