"""How often a model that has a secret tells it."""

import json


def test_a_model_is_attacked(tmp_path, works, book, config):
    config.write_text(config.read_text().replace("context_length = 16", "context_length = 700"))
    works("train", book, "--config", config, "--out", tmp_path / "run", "--quiet", "--steps", 2)
    works("constitution", "--out", tmp_path, "--prompts", 8)
    works(
        "sft", "--start", tmp_path / "run", tmp_path / "start.jsonl", "--out", tmp_path / "naive", "--steps", 2,
        "--set", "data.length=320", "--quiet",
    )  # fmt: skip
    out, _ = works(
        "redteam", tmp_path / "naive", "--attacks", 10, "--questions", 5, "--tokens", 8, "--written", 2,
        "--out", tmp_path / "report.json",
    )  # fmt: skip
    assert "0 of 10 attacks succeed: 0.0% (95% interval 0.0 to 27.8%)" in out or "0 of 1" in out
    assert "harmless questions: 0 of 5" in out and "rejected: " in out
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["attacks"] == len(told["outcomes"]) >= 10 and told["successes"] == 0


def test_mistakes_get_a_sentence(tmp_path, fails):
    assert "no run or checkpoint at" in fails("redteam", tmp_path / "nothing")
    assert fails("redteam", tmp_path, "--attacks", 0).startswith("--attacks, --questions")
