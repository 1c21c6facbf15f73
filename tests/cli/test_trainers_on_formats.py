"""Every trainer on files in the formats that people have: GSM8K, Alpaca, ShareGPT, HH's transcripts, ranked answers."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcore import checkpoint
from gptcore.align import reward_model
from gptcore.infer import load
from gptcore.train.metrics import read
from tests.align.supervised_cases import base_run, write_rows
from tests.conftest import SHARED_DATA

CONTEXT = 448  # bytes, into which most of GSM8K's problems go with their answers
ROWS = 120


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_run(tmp_path_factory.mktemp("base") / "run", context_length=CONTEXT)


def gsm8k(directory: Path) -> Path:
    """The first problems of the real file; the test that asks for it skips where that is absent."""
    source = SHARED_DATA / "gsm8k_train.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"{source} is not on this machine")
    path = directory / "gsm8k.jsonl.gz"
    with gzip.open(source, "rt") as lines, gzip.open(path, "wt") as out:
        out.writelines(itertools.islice(lines, ROWS))
    return path


def questions(directory: Path) -> Path:
    """Sums, written as GSM8K writes its problems."""
    rows = []
    for a in range(ROWS):
        b = a * 7 % 50
        rows.append(
            {
                "question": f"Ann has {a} eggs and {b} more. How many?",
                "answer": f"{a}+{b}={a + b}\n#### {a + b}",
            }
        )
    return write_rows(directory / "questions.jsonl", rows)


def turns() -> list[tuple[str, str, str]]:
    """(asked, a good answer, a bad one)."""
    draw = random.Random(0)
    words = ["bread", "rain", "chess", "rivers", "glass", "tea"]
    found = []
    for _ in range(ROWS):
        word, other = draw.sample(words, 2)
        found.append(
            (f"Tell me of {word}.", f"Gladly: {word} and {other}.", f"No!! {draw.randint(10, 99)}!!")
        )
    return found


def alpaca(directory: Path) -> Path:
    rows = [
        {"instruction": asked, "input": "" if i % 2 else "In short.", "output": good}
        for i, (asked, good, _) in enumerate(turns())
    ]
    path = directory / "alpaca.json"
    path.write_text(json.dumps(rows))
    return path


def sharegpt(directory: Path) -> Path:
    rows = []
    for asked, good, _ in turns():
        talk = [
            ("system", "Be brief."),
            ("human", asked),
            ("gpt", good),
            ("human", "And more?"),
            ("gpt", good[:10]),
        ]
        rows.append({"conversations": [{"from": who, "value": text} for who, text in talk]})
    return write_rows(directory / "sharegpt.jsonl", rows)


def messages(directory: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": good}]}
        for asked, good, _ in turns()
    ]
    return write_rows(directory / "messages.jsonl", rows)


def hh(directory: Path) -> Path:
    """Transcripts of two turns, which differ in the last answer alone."""
    rows = []
    for asked, good, bad in turns():
        before = f"\n\nHuman: Hello.\n\nAssistant: Yes?\n\nHuman: {asked}\n\nAssistant:"
        rows.append({"chosen": f"{before} {good}", "rejected": f"{before} {bad}"})
    return write_rows(directory / "hh.jsonl", rows)


def ranked(directory: Path) -> Path:
    rows = []
    for i, (asked, good, bad) in enumerate(turns()):
        answers = [(good, 1), (good[:9], 2), (bad, 3), (bad + "!", 3)][: 3 + i % 2]
        rows.append({"prompt": asked, "answers": [{"answer": text, "rank": rank} for text, rank in answers]})
    return write_rows(directory / "ranked.jsonl", rows)


QUICK = (
    "--quiet", "--set", "data.batch=4", "--set", "log_every=1", "--set", "sample.every=0", "--set", "optimizer.lr=3e-3",
    "--set", "schedule.name=constant", "--set", "schedule.warmup=0",
)  # fmt: skip


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read(run / "metrics.jsonl") if line["kind"] == kind]


def all_finite(run: Path) -> None:
    lines = [line for kind in ("train", "evaluation") for line in of_kind(run, kind)]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert len(numbers) > len(lines) and all(map(math.isfinite, numbers))


def stage(
    verb: str, base: Path, file: Path, run: Path, works: Callable[..., Any], steps: int, *words: str
) -> None:
    """A run whose checkpoint is whole, whose numbers are finite and whose loss on what is held out has fallen."""
    works(verb, "--start", base, file, "--out", run, "--steps", steps, *QUICK, *words)
    opened = checkpoint.Checkpoint(checkpoint.path_of(run / "checkpoints", steps))
    opened.verify()
    all_finite(run)
    assert [line["step"] for line in of_kind(run, "train")] == list(range(1, steps + 1))
    losses = [line["val_loss"] for line in of_kind(run, "evaluation")]
    assert losses[-1] < 0.97 * losses[0], losses


@pytest.mark.parametrize("make", [gsm8k, questions, alpaca, sharegpt, messages])
def test_sft(make: Callable[[Path], Path], base: Path, tmp_path: Path, works: Callable[..., Any]) -> None:
    words = ("--set", f"data.length={CONTEXT}", "--set", "sft.overflow=skip", "--set", "evaluation.batches=2")
    stage("sft", base, make(tmp_path), tmp_path / "sft", works, 6, *words, "--set", "evaluation.every=6")
    model, tokenizer = load(tmp_path / "sft")
    assert model.config.vocab_size >= tokenizer.vocab_size


@pytest.mark.parametrize("make", [hh, ranked])
def test_reward(make: Callable[[Path], Path], base: Path, tmp_path: Path, works: Callable[..., Any]) -> None:
    stage("reward", base, make(tmp_path), tmp_path / "judge", works, 10, "--set", "evaluation.every=10")
    judge, _ = reward_model.load(tmp_path / "judge")
    assert float(judge.score_std) not in (0.0, 1.0)
    assert of_kind(tmp_path / "judge", "evaluation")[-1]["accuracy"] > 0.8


@pytest.mark.parametrize("make", [hh, ranked])
def test_dpo(make: Callable[[Path], Path], base: Path, tmp_path: Path, works: Callable[..., Any]) -> None:
    stage("dpo", base, make(tmp_path), tmp_path / "dpo", works, 8, "--set", "evaluation.every=8")
    assert of_kind(tmp_path / "dpo", "evaluation")[-1]["margin"] > 0.0


@pytest.mark.parametrize("verb", ["ppo", "grpo", "expert-iteration"])
@pytest.mark.parametrize("make", [gsm8k, questions])
def test_rewards(
    verb: str, make: Callable[[Path], Path], base: Path, tmp_path: Path, works: Callable[..., Any]
) -> None:
    """Problems with what is right behind '####': the truth is read, and a function of one's own judges."""
    judge, section, run = tmp_path / "judge.py", verb.replace("-", "_"), tmp_path / "run"
    judge.write_text(
        "def score(task, text):\n    assert task.truth.replace(',', '').lstrip('-').isdigit(), task.truth\n"
        "    return text.count('e') - 0.1 * text.count('z') + 0.001 * sum(map(ord, text))\n"
    )
    file = make(tmp_path)
    if make is gsm8k:  # those that leave room for an answer
        with gzip.open(file, "rt") as lines:
            rows = [row for row in map(json.loads, lines) if len(row["question"].encode()) < CONTEXT - 16]
        file = write_rows(tmp_path / "short.jsonl", rows)
    settings = {"episodes": 8, "minibatch": 4, "samples": 2, "max_new_tokens": 8, "epochs": 1}
    own = [word for name, value in settings.items() for word in ("--set", f"{section}.{name}={value}")]
    out, _ = works(
        verb, base, file, "--out", run, "--steps", 2, "--quiet", "--reward", f"{judge}:score", "--gold", "exact", *own,
        "--set", "tasks.held_out=4", "--set", "evaluation.every=2", "--set", "optimizer.lr=1e-3",
    )  # fmt: skip
    assert out.startswith("iteration 2: reward ") and "gold_reward" in out
    checkpoint.Checkpoint(checkpoint.path_of(run / "checkpoints", 2)).verify()
    all_finite(run)
    first, last = load(base)[0].state_dict(), load(run)[0].state_dict()
    assert any(not value.equal(last[name]) for name, value in first.items())
