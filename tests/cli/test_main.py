"""The frame of the command line: verbs, help, errors in one sentence, exit codes, instant help."""

import argparse
import errno
import importlib
import os
import shlex
import subprocess
import sys

import pytest

import gptcore
from gptcore.cli import main as frame
from gptcore.cli.main import VERBS, build_parser, main
from gptcore.errors import UserError


def test_overview_lists_every_verb(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(verb in out and summary in out for verb, summary in VERBS.items())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gptcore {gptcore.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_description_and_examples(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: gptcore {verb}" in out
    examples = out.partition("\nexamples:\n")[2]
    assert sum(line.startswith(f"  gptcore {verb}") for line in examples.splitlines()) >= 2
    assert max(map(len, out.splitlines())) <= 110
    for action in build_parser(verb)._actions:
        assert action.help, f"{action.dest} has no help"


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_commands_that_parse(verb):
    examples = importlib.import_module(f"gptcore.cli.{verb.replace('-', '_')}").__doc__.partition(
        "\nExamples:\n"
    )[2]
    for line in examples.splitlines():
        command = line.strip().partition("   ")[0]  # what follows wide space is a remark
        words = shlex.split(command)
        if words and words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        shell = next((i for i, word in enumerate(words) if word in ("<", ">")), None)
        if words:
            assert words[:2] == ["gptcore", verb]
            build_parser(verb).parse_args(words[2:shell])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["presets", "--jsn"], "unknown option '--jsn'; known: --help"),
        (["info", "--jsno"], "unknown option '--jsno'; did you mean '--json'?"),
        (["generate"], "the following arguments are required: model; 'gptcore generate --help' explains"),
        (
            ["generate", "x", "--top-k", "many"],
            "argument --top-k: invalid int value: 'many'; 'gptcore generate",
        ),
        (["presets", "gtp2"], "unknown preset 'gtp2'; did you mean 'gpt2'?"),
    ],
)
def test_what_cannot_be_understood_is_one_sentence_and_exit_2(words, sentence, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"gptcore: error: {sentence}")
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("two\n lines"), "two lines"),
        (TypeError("x"), "x"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "c"), "c: No such file or directory"),
        (MemoryError(), "not enough memory; take a smaller model, batch or length"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory; take a"),
    ],
)
def test_errors_of_a_verb_become_sentences(error, sentence, capsys, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr("gptcore.cli.presets.run", fail)
    assert main(["presets"]) == 2
    assert capsys.readouterr().err.startswith(f"gptcore: error: {sentence}")
    monkeypatch.setenv("GPTCORE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["presets"])


def test_bugs_are_not_hidden(monkeypatch):
    monkeypatch.setattr("gptcore.cli.presets.run", lambda args: [][0])
    with pytest.raises(IndexError):
        main(["presets"])


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("gptcore.cli.presets.run", interrupted)
    assert main(["presets"]) == 130
    assert capsys.readouterr().err == "\ngptcore: stopped\n"


def test_a_closed_pipe_is_quiet():
    code = "from gptcore.cli.main import main; raise SystemExit(main(['presets']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.wait(timeout=30) == 141
        assert process.stderr.read() == b""


def test_help_is_instant_and_loads_nothing_heavy():
    code = (
        "import sys; from gptcore.cli.main import main; main(['--help']); main(['train', '--help']); "
        "sys.exit(' '.join({'torch', 'numpy', 'tokenizers', 'matplotlib', 'gptcore._C'} & set(sys.modules)) or 0)"
    )
    best = 9.0
    for _ in range(5):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        best = min(best, sum(after[2:4]) - sum(before[2:4]))  # of children, user and system
        assert done.returncode == 0, f"help imports {done.stderr}"
    # measured 0.05 s; processor time and the best of five, so that a busy machine does not fail the test
    assert best < 0.2


def test_python_m_gptcore_is_the_command():
    done = subprocess.run([sys.executable, "-m", "gptcore", "nope"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "unknown command 'nope'" in done.stderr


def test_parsers_take_no_abbreviations():
    for verb in VERBS:
        parser = build_parser(verb)
        assert isinstance(parser, argparse.ArgumentParser) and not parser.allow_abbrev
    assert frame.explain(RuntimeError("a bug")) is None
