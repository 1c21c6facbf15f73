"""``gptcore train``: a run from text to checkpoint, resuming it, and every kind of bad input."""

import errno
import json
import os

import pytest

from gptcore import checkpoint
from gptcore.train import events

from .conftest import contents


def weights(run):
    tensors, state = checkpoint.load(run / "checkpoints")
    return checkpoint.model_tensors(tensors, state)


def same(one, other):
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


def test_a_run_leaves_all_its_files_and_says_what_comes_next(run, works, book, config):
    made = set(map(str, contents(run)))
    expected = {
        "config.json", "metrics.jsonl", "loss.png", "checkpoints/step-00000004/manifest.json", "data/manifest.json",
        "tokenizer/tokenizer.json",
    }  # fmt: skip
    assert expected <= made
    out, _ = works("train", book, "--config", config, "--out", run, "--quiet")  # nothing left to do
    assert "step 4, held out" in out and "bits per byte" in out
    assert f"next: gptcore generate {run}" in out


def test_settings_override_in_the_announced_order(tmp_path, book, config, works):
    run = tmp_path / "run"
    words = (
        "--steps",
        "3",
        "--set",
        "steps=2",
        "--set",
        "optimizer.lr=5e-4",
        "--set",
        "schedule.name=constant",
    )
    works("train", book, "--config", config, "--out", run, "--quiet", *words)
    kept = json.loads((run / "config.json").read_text())
    assert (kept["steps"], kept["optimizer"]["lr"], kept["schedule"]["name"]) == (2, 5e-4, "constant")
    assert kept["data"]["path"] == [str(book)] and kept["model"]["width"] == 16


def test_a_preset_and_prepared_data(tmp_path, book, works):
    data, run = tmp_path / "data", tmp_path / "run"
    works("prepare", book, "--out", data, "--tokenizer", "characters", "--quiet")
    settings = ("--set", "model.num_layers=1", "--set", "evaluation.batches=1", "--set", "data.batch=1")
    works("train", "shakespeare-char", data, "--out", run, "--steps", "1", "--quiet", *settings)
    kept = json.loads((run / "config.json").read_text())
    assert kept["model"]["preset"] == "shakespeare-char"
    assert kept["data"]["length"] == 64  # no longer than the preset's context
    assert not (run / "data").exists()  # used where it is


def test_stopping_and_resuming_gives_the_weights_of_one_run(run, tmp_path, book, config, works):
    parts = tmp_path / "parts"
    half = ("--set", "schedule.name=constant", "--out")
    works("train", book, "--config", config, *half, parts, "--steps", "2", "--quiet")
    works("train", "--resume", parts, "--steps", "4", "--quiet")
    whole = tmp_path / "whole"
    works("train", book, "--config", config, *half, whole, "--quiet")
    assert same(weights(parts), weights(whole))
    assert not same(weights(parts), weights(run))  # that one had another schedule


def test_a_run_is_not_continued_by_mistake(run, book, config, fails, works):
    before = contents(run)
    sentence = fails("train", book, "--config", config, "--out", run, "--set", "optimizer.lr=1e-4")
    assert "optimizer.lr 0.001 -> 0.0001" in sentence and f"gptcore train --resume {run}" in sentence
    assert contents(run) == before
    works("train", "--resume", run, "--set", "optimizer.lr=1e-4", "--steps", "5", "--quiet")


def test_bad_words_name_the_remedy(tmp_path, book, config, fails):
    out = ("--out", tmp_path / "none")
    cases = [
        (("train", "gtp2", book), "unknown preset 'gtp2'; did you mean 'gpt2'?"),
        (("train", tmp_path / "missing.txt"), f"no file or directory at '{tmp_path / 'missing.txt'}'"),
        (("train", "gpt2", tmp_path / "missing.txt"), "no file or directory at"),
        (("train", "--config", tmp_path / "missing.toml"), "no config file at"),
        (("train", book, "--config", config, "--set", "optimiser.lr=1"), "did you mean '"),
        (
            ("train", book, "--config", config, "--set", "optimizer.lr=fast"),
            "optimizer.lr: expected a number",
        ),
        (("train", book, "--config", config, "--set", "optimizer.lr"), "expected key=value"),
        (("train", book, "--config", config, "--steps", "0"), "steps"),
        (("train", book, "--config", config, "--set", "data.length=0"), "data.length"),
        (("train", book, "--config", config, "--set", "data.batch=-3"), "data.batch"),
        (("train", book, "--config", config, "--set", "data.length=17"), "data.length: 17 is more than"),
        (("train", book, "--config", config, "--set", "data.tokenizer=bpee"), "no tokenizer at 'bpee'"),
        (("train", book, "--config", config, "--set", "model.vocab_size=100"), "model.vocab_size"),
        (
            ("train", book, "--config", config, "--set", "model.attention.num_heads=3"),
            "16 is not a multiple of 3",
        ),
    ]
    for words, part in cases:
        sentence = fails(*words, *out, "--quiet")
        assert part in sentence, (words, sentence)
        assert not (tmp_path / "none" / "checkpoints").exists()
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")
    assert "not valid TOML" in fails("train", "--config", broken)
    assert "no run to continue" in fails("train", "--resume", tmp_path / "nowhere")
    assert "leave out WHAT" in fails("train", book, "--resume", tmp_path)


def test_a_text_shorter_than_a_row(tmp_path, config, fails):
    short = tmp_path / "short.txt"
    short.write_text("ab")
    fails("train", short, "--config", config, "--out", tmp_path / "run", "--quiet")


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_is_refused_and_everything_else_kept(run, fails, tmp_path):
    shard = next((run / "data").glob("train*"))
    flip(shard, 4096 + 10)  # among the token ids
    before = contents(run / "checkpoints")
    sentence = fails("train", "--resume", run, "--steps", "8", "--quiet")
    assert str(shard) in sentence
    assert contents(run / "checkpoints") == before
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "truncated" in fails("train", "--resume", run, "--steps", "8", "--quiet")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, works, fails):
    newest = run / "checkpoints" / "step-00000004" / "shard-00000-of-00001.safetensors"
    good = weights(run)
    flip(newest, -3)
    _, err = works("train", "--resume", run, "--quiet")
    assert "falling back to step 2" in err
    assert same(weights(run), good)
    for path in (run / "checkpoints").glob("*/manifest.json"):
        path.write_bytes(path.read_bytes()[:100])
    assert "no good checkpoint" in fails("train", "--resume", run, "--quiet")


def test_a_diverging_run_says_so_and_keeps_its_checkpoint(tmp_path, book, config, fails):
    run = tmp_path / "run"
    wild = ("--set", "optimizer.lr=1e30", "--set", "optimizer.max_norm=0", "--set", "schedule.warmup=0")
    sentence = fails("train", book, "--config", config, "--out", run, "--steps", "50", "--quiet", *wild)
    assert "not finite" in sentence or "loss is" in sentence
    assert "lower optimizer.lr" in sentence


def test_a_full_disk_keeps_the_checkpoints_there_are(run, fails, monkeypatch):
    before = contents(run / "checkpoints")
    real = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left" in fails("train", "--resume", run, "--steps", "6", "--quiet")
    assert contents(run / "checkpoints") == before


def test_two_processes_cannot_share_a_run(run, fails):
    from gptcore.train.run_directory import RunDirectory

    with RunDirectory(run):
        assert f"is in use by process {os.getpid()}" in fails(
            "train", "--resume", run, "--steps", "6", "--quiet"
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_of_a_run_is_that_of_its_weights(tmp_path, book, config, works, dtype):
    run = tmp_path / dtype
    works(
        "train", book, "--config", config, "--out", run, "--quiet", "--set", f"dtype={dtype}", "--steps", "2"
    )
    assert {str(tensor.dtype) for tensor in weights(run).values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["python", "/bin/gptcore", "quickstart"], "gptcore train --resume 'runs/a b'"),
        (["/bin/python", "-m", "gptcore", "train", "x"], "python -m gptcore train --resume 'runs/a b'"),
        (["/bin/python", "my.py", "--lr", "1"], "python my.py --lr 1"),
    ],
)
def test_a_stopped_run_names_the_command_that_continues_it(monkeypatch, argv, command):
    import sys

    from gptcore.train.stop import resume_command

    monkeypatch.setattr(sys, "orig_argv", argv)
    assert resume_command("runs/a b") == command


def test_changes_as_typed_are_made_resumed_and_replayed(tmp_path, book, config, works, fails):
    """A run with changes on the command line, and one that replays its log, end alike."""
    run, again = tmp_path / "run", tmp_path / "again"
    typed = ("--change", "step=1,lr=2e-3", "--change", "step=2,optimizer=sgd,lr=0.1")
    works("train", book, "--config", config, "--out", run, "--quiet", *typed)
    works("train", "--resume", run, "--steps", "6", "--change", "step=5,max_norm=0.5", "--quiet")
    assert [c["step"] for c in json.loads((run / "config.json").read_text())["changes"]] == [1, 2, 5]
    kept = ("--set", "steps=6", "--replay", run / "events.jsonl")
    works("train", book, "--config", config, "--out", again, "--quiet", *kept)
    told = [events.read(at / "events.jsonl") for at in (run, again)]
    assert told[0] == told[1]
    assert [(e["step"], e["action"]) for e in told[0]] == [(1, "change"), (2, "change"), (5, "change")]
    assert "no event log at" in fails("train", book, "--config", config, "--replay", tmp_path / "none.jsonl")
    assert "--change 5: expected step=N" in fails("train", book, "--config", config, "--change", "5")
