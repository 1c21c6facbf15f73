"""Experts from the command line: a config with them, generation, and starting from a dense run."""

import json

import pytest
import torch

from gptcore.infer import load
from gptcore.train.metrics import read


def lines(run, kind):
    return [line for line in read(run / "metrics.jsonl") if line["kind"] == kind]


def test_a_config_with_experts_trains_and_generates(works, book, config, tmp_path):
    config.write_text(config.read_text() + "[model.moe]\nnum_experts = 4\nshared_experts = 1\n")
    _, err = works("train", book, "--config", config, "--out", tmp_path / "run", "--set", "model.moe.top_k=3")
    assert " for each token)" in err and "val_drop_rate 0.0000" in err
    assert lines(tmp_path / "run", "train")[-1]["routing"]["layers"] == [0]
    assert (tmp_path / "run" / "routing.png").exists()
    model, _ = load(tmp_path / "run")
    assert (model.config.moe.num_experts, model.config.moe.top_k) == (4, 3)
    text, _ = works("generate", tmp_path / "run", "--prompt", "Line", "--max-new-tokens", "5")
    assert text.startswith("Line")


def test_a_dense_run_becomes_experts_that_start_where_it_ended(run, works, book, config, tmp_path):
    words = ("train", book, "--config", config, "--start", run, "--out", tmp_path / "grown", "--quiet")
    works(*words, "--set", "model.moe.num_experts=4")
    ended, began = lines(run, "evaluation")[-1], lines(tmp_path / "grown", "evaluation")[0]
    assert began["step"] == 0 and began["val_loss"] == pytest.approx(ended["val_loss"], rel=1e-5)
    works(*words, "--set", "model.moe.num_experts=4")  # which continues a finished run: nothing to do
    kept = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert kept["start"] == str(run) and kept["model"]["moe"] == {"num_experts": 4}


def test_a_run_starts_from_the_same_model_as_it_is(run, works, book, tmp_path):
    works("train", book, "--start", run, "--out", tmp_path / "on", "--steps", "1", "--quiet",
          "--set", "optimizer.lr=0.0", "--set", "data.batch=2")  # fmt: skip
    first, again = load(run)[0], load(tmp_path / "on")[0]
    assert first.config == again.config
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in first.state_dict().items())


def test_a_hugging_face_model_starts_a_run_too(run, works, book, tmp_path):
    works("convert", run, tmp_path / "theirs")
    works("train", book, "--start", tmp_path / "theirs", "--out", tmp_path / "on", "--steps", "1", "--quiet",
          "--set", "optimizer.lr=0.0", "--set", "data.batch=2")  # fmt: skip
    first, again = load(run)[0].state_dict(), load(tmp_path / "on")[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_what_is_refused(run, fails, book, tmp_path):
    out = ("--out", tmp_path / "out", "--quiet")
    assert "--start brings its own model; leave out 'gpt2'" in fails(
        "train", "gpt2", book, "--start", run, *out
    )
    assert "no run or checkpoint at" in fails("train", book, "--start", tmp_path / "absent", *out)
    assert "differ in more than experts" in fails(
        "train", book, "--start", run, *out, "--set", "model.num_layers=2"
    )
    assert "vocabulary mismatch" in fails(
        "train",
        book,
        "--start",
        run,
        "--out",
        tmp_path / "other",
        "--quiet",
        "--set",
        "data.tokenizer=characters",
    )
    assert "leave out WHAT, --config, --out and --start" in fails("train", "--resume", run, "--start", run)
