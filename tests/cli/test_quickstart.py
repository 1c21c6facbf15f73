"""``gptcore quickstart --short``: the whole chain, with every operation on a kernel."""

import json

import pytest

from gptcore import backend
from gptcore.cli import quickstart
from gptcore.cli.main import main


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """One short quickstart in an empty directory: its directory, output and fallbacks."""
    import contextlib
    import io
    import os

    place = tmp_path_factory.mktemp("quickstart")
    out, before = io.StringIO(), os.getcwd()
    os.chdir(place)
    try:
        with contextlib.redirect_stdout(out):
            code = main(["quickstart", "--short", "--quiet"])
    finally:
        os.chdir(before)
    assert code == 0
    return place / "runs" / "quickstart", out.getvalue(), backend.report()


def test_it_learns_writes_and_says_what_to_try(short):
    directory, out, _ = short
    line = next(line for line in out.splitlines() if line.startswith("held-out bits per byte"))
    before, after = (float(word) for word in line.split() if word.replace(".", "").isdigit() and "." in word)
    assert after < before - 0.3
    assert out.count("--- sample ---") == 2
    assert "gptcore generate runs/quickstart" in out
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((directory / "checkpoints").glob("step-*/manifest.json"))


def test_no_operation_falls_back_to_torch(short):
    assert short[2] == {}
    assert "every operation ran on gptcore's kernels" in short[1]


def test_its_run_can_be_used_like_any_other(short, works):
    directory, _, _ = short
    out, _ = works("generate", directory, "--prompt", "The", "--max-new-tokens", "5")
    assert out.startswith("The")
    works("train", "--resume", directory, "--steps", "22", "--quiet")
    assert json.loads((directory / "config.json").read_text())["steps"] == 22


def test_the_first_free_directory_is_taken(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert str(quickstart._directory(None)) == "runs/quickstart"
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    assert str(quickstart._directory(None)) == "runs/quickstart-2"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    assert "is in use; choose another --out" in fails("quickstart", "--out", mine)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_a_slow_machine_takes_fewer_steps_and_says_so(monkeypatch, capsys, tmp_path):
    import argparse

    args = argparse.Namespace(steps=None, seed=1)
    config = quickstart._config(tmp_path, tmp_path, quickstart._FULL, args)
    monkeypatch.setattr(quickstart, "_seconds_per_step", lambda config: 0.001)
    assert quickstart._within_budget(config) is config
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(quickstart, "_seconds_per_step", lambda config: 0.5)
    fewer = quickstart._within_budget(config)
    assert fewer.steps * 0.5 <= quickstart._BUDGET_SECONDS < (fewer.steps + 50) * 0.5
    assert f"{fewer.steps} steps instead of {config.steps}" in capsys.readouterr().out
    assert fewer.optimizer == config.optimizer


def test_steps_that_cannot_be_are_refused(fails, tmp_path):
    assert "steps" in fails("quickstart", "--steps", "0", "--out", tmp_path / "run")
