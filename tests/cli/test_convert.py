"""``gptcore convert``: a run to Hugging Face and back, and what it refuses."""

import json

import torch

from gptcore import checkpoint
from gptcore.infer import load


def test_a_run_becomes_a_hugging_face_directory_and_a_run_again(run, works, tmp_path):
    out, _ = works("convert", run, tmp_path / "theirs")
    assert out.startswith(f"{run} -> {tmp_path / 'theirs'}, ") and out.rstrip().endswith(
        "parameters in float32"
    )
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["eos_token_id"] == load(run)[1].eot
    works("convert", tmp_path / "theirs", tmp_path / "again")
    options = ("--prompt", "Line 1", "--max-new-tokens", "12")
    texts = [
        works("generate", place, *options)[0] for place in (run, tmp_path / "theirs", tmp_path / "again")
    ]
    assert texts[0] == texts[1] == texts[2]
    first, again = load(run)[0].state_dict(), load(tmp_path / "again")[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_dtype_and_family_are_chosen(run, works, tmp_path):
    out, _ = works("convert", run, tmp_path / "theirs", "--dtype", "bfloat16", "--family", "gpt2")
    assert out.rstrip().endswith("bfloat16")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "gpt2"
    assert next(checkpoint.from_hf(tmp_path / "theirs").parameters()).dtype == torch.bfloat16


def test_a_model_without_tokenizer_is_converted_and_says_so(run, works, fails, tmp_path):
    works("convert", run, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    out, _ = works("convert", tmp_path / "theirs", tmp_path / "again")
    assert "without a tokenizer" in out
    assert "holds no tokenizer" in fails("generate", tmp_path / "again", "--prompt", "L")


def test_what_is_refused(run, works, fails, tmp_path):
    assert "already holds a model" in fails("convert", run, run)
    assert "no directory at" in fails("convert", tmp_path / "absent", tmp_path / "out")
    assert "llama: " in fails("convert", run, tmp_path / "out", "--family", "llama")
    assert "did you mean 'llama'?" in fails("convert", run, tmp_path / "out", "--family", "lama")
    works("convert", run, tmp_path / "theirs")
    assert "--family is for writing" in fails(
        "convert", tmp_path / "theirs", tmp_path / "o", "--family", "llama"
    )
