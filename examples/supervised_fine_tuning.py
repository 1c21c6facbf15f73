"""Fine-tuning from Python: demonstrations, a chat template, a run that resumes, and an answer at the end.

A byte model learns in some seconds to repeat a letter as often as it is asked to. The base model is a run of
``gptcore train``; here it has been trained for a moment only, on the same alphabet.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from gptcore.align.supervised import fine_tune
from gptcore.cli.main import main as gptcore
from gptcore.data.chat import chat_for
from gptcore.infer import generate, load
from gptcore.infer.trained import tokenizer_place

MODEL = ["model.num_layers=2", "model.width=64", "model.context_length=128", "model.attention.num_heads=4"]

with tempfile.TemporaryDirectory() as place:
    here, draw = Path(place), random.Random(0)
    (here / "alphabet.txt").write_text("abcdef " * 400)
    settings = [*MODEL, "data.tokenizer=bytes", "data.length=64", "sample.every=0"]
    options = [word for setting in settings for word in ("--set", setting)]
    base = here / "base"
    gptcore(["train", str(here / "alphabet.txt"), "--out", str(base), "--steps", "20", "--quiet", *options])

    rows = []
    for _ in range(400):
        letter, times = draw.choice("abcdef"), draw.randint(1, 9)
        messages = [
            {"role": "user", "content": f"{times} times {letter}, please"},
            {"role": "assistant", "content": letter * times},
        ]
        rows.append({"messages": messages})
    (here / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    result = fine_tune(
        {
            "run_dir": str(here / "sft"),
            "start": str(base),
            "data": {"length": 128, "batch": 4},
            "optimizer": {"lr": 1e-2},
            "sft": {"files": str(here / "talk.jsonl"), "epochs": 10},
        },
        quiet=True,
    )
    print(f"{result.step} updates, held-out loss {result.evaluation['val_loss']:.3f} nats per token")

    model, tokenizer = load(here / "sft" / "best")
    chat = chat_for(tokenizer, tokenizer_place(here / "sft" / "best"))
    for question in ("3 times a, please", "7 times e, please"):
        answer = generate(
            model,
            tokenizer,
            chat.prompt_ids(question),
            max_new_tokens=12,
            temperature=0.0,
            end_ids=chat.stop_ids,
        )
        print(f"{question} -> {answer.text}")
