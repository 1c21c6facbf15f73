"""``gptcore generate``: output, options, and what it refuses."""

import io
import sys

import pytest

from gptcore import checkpoint
from gptcore.cli.main import main
from gptcore.infer import generate, load

OPTIONS = ("--max-new-tokens", "12", "--seed", "5")


def test_text_goes_to_stdout_and_notes_to_stderr(run, works):
    model, tokenizer = load(run)
    expected = generate(model, tokenizer, "Line 1", max_new_tokens=12, seed=5, overflow="slide")
    out, err = works("generate", run, "--prompt", "Line 1", *OPTIONS)
    assert out == f"Line 1{expected.text}\n"
    assert err.startswith("gptcore: prompt of ") and "ended by" in err
    quiet, err = works("generate", run, "--prompt", "Line 1", *OPTIONS, "--quiet")
    assert (quiet, err) == (f"{expected.text}\n", "")


def test_a_checkpoint_file_and_its_run_give_the_same(run, works):
    from_run = works("generate", run, "--prompt", "L", *OPTIONS)[0]
    newest = max((run / "checkpoints").iterdir())
    assert works("generate", newest, "--prompt", "L", *OPTIONS)[0] == from_run
    assert works("generate", run / "checkpoints", "--prompt", "L", *OPTIONS)[0] == from_run


def test_prompts_from_a_file_and_from_standard_input(run, works, tmp_path, monkeypatch):
    expected = works("generate", run, "--prompt", "Line", *OPTIONS)[0]
    path = tmp_path / "prompt.txt"
    path.write_text("Line\n")
    assert works("generate", run, "--prompt-file", path, *OPTIONS)[0] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("Line\n"))
    assert works("generate", run, *OPTIONS)[0] == expected


def test_samples_differ_and_the_first_is_the_single_one(run, works):
    single = works("generate", run, "--prompt", "L", *OPTIONS, "--quiet", "--temperature", "1.5")[0]
    out = works(
        "generate", run, "--prompt", "L", *OPTIONS, "--quiet", "--temperature", "1.5", "--samples", "3"
    )[0]
    texts = out.split("--- sample ")[1:]
    assert len(texts) == 3 and texts[0] == f"1 ---\n{single}"
    assert len({text.partition("\n")[2] for text in texts}) == 3


def test_a_full_context_slides_and_says_so(run, works):
    _, err = works("generate", run, "--prompt", "Line 1", "--max-new-tokens", "40", "--ignore-end")
    assert "the context was full" in err


def test_what_is_refused(run, fails, tmp_path, works):
    cases = [
        ((tmp_path / "missing",), "no run or checkpoint at"),
        ((tmp_path,), "holds no checkpoint"),
        ((run, "--temperature", "-1"), "temperature is -1.0"),
        ((run, "--top-p", "0"), "top_p is 0.0"),
        ((run, "--top-k", "-2"), "top_k is -2"),
        ((run, "--seed", "-1"), "seed is -1"),
        ((run, "--samples", "0"), "num_samples is 0"),
        ((run, "--max-new-tokens", "-1"), "max_new_tokens is -1"),
        ((run, "--stop", ""), "a stop string is empty"),
        ((run, "--tokenizer", tmp_path / "nothing"), "no tokenizer at"),
    ]
    for words, part in cases:
        assert part in fails("generate", *words, "--prompt", "L"), words
    torn = tmp_path / "torn.txt"
    torn.write_bytes(b"\xff")
    assert "not UTF-8" in fails("generate", run, "--prompt-file", torn)
    assert "missing.txt: No such file" in fails("generate", run, "--prompt-file", tmp_path / "missing.txt")


def test_another_tokenizer_is_refused_by_its_fingerprint(run, book, tmp_path, works, fails):
    works("prepare", book, "--out", tmp_path / "other", "--tokenizer", "characters", "--quiet")
    sentence = fails("generate", run, "--prompt", "L", "--tokenizer", tmp_path / "other")
    assert sentence.startswith("vocabulary mismatch: ") and "use the tokenizer" in sentence


def test_a_damaged_checkpoint_is_refused(run, fails):
    newest = max((run / "checkpoints").iterdir())
    shard = newest / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    weight = next(t for name, t in checkpoint.load(newest)[0].items() if name.startswith("model/"))
    data[data.index(weight.numpy().tobytes())] ^= 1
    shard.write_bytes(data)
    assert "corrupt" in fails("generate", newest, "--prompt", "L")
    shard.write_bytes(data[:-50])
    assert str(newest) in fails("generate", newest, "--prompt", "L")
    other = newest.with_name("notes.txt")
    other.write_text("not a checkpoint")
    assert "notes.txt" in fails("generate", other, "--prompt", "L")


def test_ctrl_c_ends_a_text(run, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gptcore.infer.generate_batch", interrupted)
    assert main(["generate", str(run), "--prompt", "L"]) == 130
    assert capsys.readouterr().err == "\ngptcore: stopped\n"


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_do_not_change_the_text(run, works, threads):
    expected = works("generate", run, "--prompt", "Line 2", *OPTIONS)[0]
    assert works("generate", run, "--prompt", "Line 2", *OPTIONS, "--threads", threads)[0] == expected
