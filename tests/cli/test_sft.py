"""``gptcore sft``: from a run and a file of demonstrations to answers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.align.supervised_cases import base_run, copying, write_rows

QUICK = (
    "--steps",
    "3",
    "--quiet",
    "--set",
    "data.length=64",
    "--set",
    "data.batch=2",
    "--set",
    "sample.every=0",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_run(tmp_path_factory.mktemp("base") / "run")


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", copying(60))


def test_it_fine_tunes_and_the_result_answers(base, data, tmp_path, works):
    out, _ = works("sft", "--start", base, data, "--out", tmp_path / "sft", *QUICK)
    assert "step 3, val_loss " in out and f"best by val_loss: {tmp_path / 'sft' / 'best'}" in out
    assert f"next: gptcore generate {tmp_path / 'sft' / 'best'} --chat" in out
    assert (tmp_path / "sft" / "tokenizer" / "chat_template.jinja").is_file()
    answer, err = works(
        "generate", tmp_path / "sft" / "best", "--chat", "--prompt", "3a", "--max-new-tokens", "5"
    )
    assert "3a" not in answer and "ended by" in err
    ask = ("--prompt", "3a", "--max-new-tokens", "5", "--quiet")
    assert (
        works("generate", tmp_path / "sft", "--chat", *ask)[0]
        == works("generate", tmp_path / "sft", "--chat", *ask)[0]
    )


def test_the_same_command_continues_and_another_is_refused(base, data, tmp_path, works, fails):
    command = ("sft", "--start", base, data, "--out", tmp_path / "sft", *QUICK)
    works(*command)
    before = (tmp_path / "sft" / "metrics.jsonl").read_text()
    assert "step 3" in works(*command)[0] and (tmp_path / "sft" / "metrics.jsonl").read_text() == before
    sentence = fails(*command, "--set", "optimizer.lr=0.5", "--set", "sft.packing=false")
    assert "optimizer.lr" in sentence and "sft.packing" in sentence and "gptcore sft --resume" in sentence
    out, _ = works("sft", "--resume", tmp_path / "sft", "--steps", "5", "--quiet")
    assert "step 5" in out
    settings = json.loads((tmp_path / "sft" / "config.json").read_text())
    assert settings["steps"] == 5 and settings["data"]["length"] == 64
    assert "leave out DATA" in fails("sft", "--resume", tmp_path / "sft", data)


def test_settings_from_a_file_with_trl_s_names(base, data, tmp_path, works):
    config = tmp_path / "sft.toml"
    config.write_text(
        f'model_name_or_path = "{base}"\ntrain_dataset = "{data}"\noutput_dir = "{tmp_path / "mine"}"\n'
        "max_steps = 2\nmax_length = 64\nper_device_train_batch_size = 1\nneftune_noise_alpha = 5\n"
        '[sft]\ntemplate = "plain"\n'
    )
    out, _ = works("sft", "--config", config, "--quiet", "--set", "learning_rate=1e-3")
    assert "step 2" in out
    settings = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert settings["optimizer"]["lr"] == 1e-3 and settings["data"]["batch"] == 1


def test_keys_of_other_names(base, data, tmp_path, works):
    rows = [{"asked": row["prompt"], "meta": {"said": row["completion"]}} for row in copying(30)]
    other = write_rows(tmp_path / "other.jsonl", rows)
    keys = ("--set", "sft.fields.prompt=asked", "--set", "sft.fields.output_key=meta.said")
    works("sft", "--start", base, other, "--out", tmp_path / "sft", *QUICK, *keys)
    assert (tmp_path / "sft" / "best").is_dir()


def test_what_is_refused(base, data, tmp_path, fails, works):
    out = ("--out", tmp_path / "no")
    empty = write_rows(tmp_path / "empty.jsonl", [{"prompt": "a", "completion": ""}])
    cases = [
        (("sft", data, *out), "start: expected the run, checkpoint or Hugging Face directory"),
        (("sft", "--start", base, *out), "sft.files: got none"),
        (("sft", "--start", tmp_path / "nothing", data, *out), "no run or checkpoint at"),
        (("sft", "--start", base, tmp_path / "absent.jsonl", *out), "no file at"),
        (("sft", "--start", base, empty, *out), "empty.jsonl, line 1: the response is empty"),
        (("sft", "--start", base, data, *out, "--set", "sft.packin=1"), "did you mean 'sft.packing'"),
        (("sft", "--start", base, data, *out, "--set", "learnin_rate=1"), "did you mean 'learning_rate'"),
        (("sft", "--start", base, data, *out, "--set", "data.length=4096"), "expected at most the context"),
        (("sft", "--resume", tmp_path / "nothing"), "no run of 'gptcore sft' to continue"),
        (("generate", base, "--chat", "--prompt", "a"), "holds no chat template"),
    ]
    for words, part in cases[:7] + cases[8:]:
        assert part in fails(*words), words
    assert "data.length" in fails(*cases[7][0]) or "4096" in fails(*cases[7][0])
    assert not (tmp_path / "no").exists()


def test_a_hugging_face_directory_to_begin_with(base, data, tmp_path, works):
    from gptcore import checkpoint
    from gptcore.infer import load

    model, tokenizer = load(base)
    checkpoint.to_hf(model, tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    shutil.rmtree(tmp_path / "sft", ignore_errors=True)
    out, _ = works("sft", "--start", tmp_path / "hf", data, "--out", tmp_path / "sft", *QUICK)
    assert "step 3" in out and Path(tmp_path / "sft" / "best").is_dir()
