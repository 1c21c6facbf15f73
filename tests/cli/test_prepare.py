"""``gptcore prepare``: what it makes, and bad input, after which everything is as it was."""

import json

import pytest

from gptcore.cli.main import main
from gptcore.data import tokenizer as tokenizers
from gptcore.data.dataset import TokenDataset

TEXT = "".join(f"Line {i} of a text that says the same again.\n" for i in range(400))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def fails(words, capsys):
    assert main([*map(str, words)]) == 2
    err = capsys.readouterr().err
    sentence = [line for line in err.splitlines() if line.startswith("gptcore: error: ")]
    assert len(sentence) == 1 and err.rstrip().endswith(sentence[0])
    return sentence[0]


def test_text_becomes_shards_that_give_the_text_back(book, tmp_path, capsys):
    out = tmp_path / "data"
    words = ["prepare", book, "--out", out, "--tokenizer", "characters", "--held-out", "0.25", "--quiet"]
    assert main([*map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert f"next: gptcore train {out}" in printed and "tokenizer: characters" in printed
    tokenizer = tokenizers.load(out)
    parts = [TokenDataset.open(out, part).shards[0] for part in ("train", "val")]
    text = "".join(tokenizer.decode(part.read(0, part.tokens)) for part in parts)
    assert text == TEXT
    assert parts[0].tokens == int(0.75 * len(TEXT))


def test_bpe_with_the_size_asked_for_and_reuse_of_a_tokenizer(book, tmp_path, capsys):
    out, again = tmp_path / "a", tmp_path / "b"
    assert main(["prepare", str(book), "--out", str(out), "--vocab-size", "300", "--quiet"]) == 0
    assert tokenizers.load(out).vocab_size == 300
    assert main(["prepare", str(book), "--out", str(again), "--tokenizer", str(out), "--quiet"]) == 0
    assert tokenizers.load(again).fingerprint == tokenizers.load(out).fingerprint


def test_an_existing_directory_is_kept_unless_replaced(book, tmp_path, capsys):
    out = tmp_path / "data"
    words = ["prepare", book, "--out", out, "--tokenizer", "bytes", "--quiet"]
    assert main([*map(str, words)]) == 0
    before = snapshot(out)
    assert "already holds prepared data; give --replace, or another --out" in fails(words, capsys)
    assert snapshot(out) == before
    book.write_text(TEXT * 2)
    assert main([*map(str, words), "--replace"]) == 0
    assert snapshot(out) != before
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    assert "is not empty" in fails(["prepare", book, "--out", other, "--replace"], capsys)
    assert snapshot(other) == {"thesis.txt": b"precious"}


def test_bad_input_leaves_no_output(book, tmp_path, capsys):
    out = tmp_path / "data"
    torn = tmp_path / "torn.txt"
    torn.write_bytes(b"fine so far \xff\xfe")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"body": "text"}) + "\n")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases = [
        ([tmp_path / "missing.txt"], "missing.txt"),
        ([book, "--tokenizer", "bpee"], "no tokenizer at 'bpee'"),
        ([book, "--tokenizer", "bytes", "--vocab-size", "9"], "vocab_size"),
        ([book, "--held-out", "1.5"], "1.5"),
        ([torn], "torn.txt"),
        ([rows], "rows.jsonl"),
        ([empty], "no text"),
        ([tmp_path / "a.exe"], "a.exe"),
    ]
    for words, part in cases:
        assert part in fails(["prepare", *words, "--out", out, "--quiet"], capsys)
        assert not out.exists()
    assert "--out" in fails(["prepare", book], capsys)


def test_a_full_disk_leaves_what_was_there(book, tmp_path, capsys, monkeypatch):
    import errno
    import os

    out = tmp_path / "data"
    words = ["prepare", book, "--out", out, "--tokenizer", "bytes", "--quiet"]
    assert main([*map(str, words)]) == 0
    before = snapshot(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # every file is fsynced before it gets its name
    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in fails([*words, "--replace"], capsys)
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
