"""A model so small that a run takes a blink, and ways to call the command line in this process."""

import pytest

from gptcore.cli.main import main

TEXT = "".join(f"Line {i} says the same as line {i // 2}, again.\n" for i in range(400))
TINY = """
steps = 4
[model]
num_layers = 1
width = 16
context_length = 16
[model.attention]
num_heads = 2
[schedule]
warmup = 0
[data]
tokenizer = "bytes"
batch = 2
length = 16
[evaluation]
every = 2
batches = 2
[checkpoint]
every = 2
"""


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(tmp_path, book):
    """A config file of a tiny run on ``book``."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def fails(capsys):
    """Calls the command line, which must refuse in one sentence with exit code 2; returns the sentence."""

    def call(*words):
        assert main([*map(str, words)]) == 2
        err = capsys.readouterr().err.rstrip()
        sentences = [line for line in err.splitlines() if line.startswith("gptcore: error: ")]
        assert len(sentences) == 1 and err.endswith(sentences[0])
        return sentences[0].removeprefix("gptcore: error: ")

    return call


@pytest.fixture
def works(capsys):
    """Calls the command line, which must succeed; returns standard output and standard error."""

    def call(*words):
        code = main([*map(str, words)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out, captured.err

    return call


@pytest.fixture
def run(tmp_path, book, config, works):
    """The directory of a finished tiny run."""
    works("train", book, "--config", config, "--out", tmp_path / "run", "--quiet")
    return tmp_path / "run"


def contents(directory):
    """Every file under ``directory`` with its bytes."""
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
