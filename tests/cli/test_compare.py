"""Assistants compared from the command line: a table, one HTML file, and sentences for what cannot be."""

import json

import pytest


@pytest.fixture
def runs(tmp_path, works, book, config):
    """Two runs that differ in how long they trained."""
    config.write_text(config.read_text().replace("context_length = 16", "context_length = 96"))
    for name, steps in (("early", 2), ("late", 4)):
        works("train", book, "--config", config, "--out", tmp_path / name, "--quiet", "--steps", steps)
    return [tmp_path / "early", tmp_path / "late"]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} says", "truth": "the"}) + "\n" for i in range(8)))
    return path


def test_files_and_a_function_as_judge(tmp_path, works, runs, questions):
    judge = tmp_path / "judge.py"
    judge.write_text("def letters(task, text):\n    return float(sum(c.isalpha() for c in text))\n")
    out, _ = works(
        "compare", *runs, "--tasks", questions, "--judge", f"{judge}:letters", "--tokens", 8,
        "--out", tmp_path / "compare.html",
    )  # fmt: skip
    assert "8 prompts" in out and f"{runs[1]} beats {runs[0]}: " in out and "at equal lengths" in out
    page = (tmp_path / "compare.html").read_text()
    assert "Win rates" in page and "prompt 3, " in page and "Helpful" not in page and "http" not in page
    again, _ = works("compare", *runs, "--tasks", questions, "--judge", f"{judge}:letters", "--tokens", 8)
    assert again.splitlines()[:4] == out.splitlines()[:4]  # the same seed draws the same answers


def test_three_virtues_of_who_keeps_secrets(tmp_path, works, book, config):
    config.write_text(config.read_text().replace("context_length = 16", "context_length = 700"))
    for seed in (1, 2):
        works(
            "train",
            book,
            "--config",
            config,
            "--out",
            tmp_path / str(seed),
            "--quiet",
            "--set",
            f"seed={seed}",
        )
    out, _ = works(
        "compare", tmp_path / "1", tmp_path / "2", "--prompts", 6, "--tokens", 8, "--out", tmp_path / "page.html"
    )  # fmt: skip
    assert out.count("helpful 0.0% [") == 2 and out.count("harmless 100.0% [") == 2  # they only babble
    assert "Helpful, honest, harmless" in (tmp_path / "page.html").read_text()


def test_mistakes_get_a_sentence(tmp_path, fails, runs, questions):
    assert "at least two models" in fails("compare", runs[0])
    assert "--prompts is at least 2" in fails("compare", *runs, "--prompts", 1)
    assert "nothing" in fails("compare", runs[0], tmp_path / "nothing", "--tasks", questions, "--tokens", 4)
    assert "there twice" in fails("compare", runs[0], runs[0], "--tasks", questions, "--tokens", 4)
    assert "did you mean 'secrets'" in fails("compare", *runs, "--tasks", "secret")
