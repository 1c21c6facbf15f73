"""From a model that tells everything to files to mend it with."""

from gptcore.data.record_files import read
from gptcore.data.records import Demonstration, Ranking


def test_the_start_is_written_without_a_model(tmp_path, works):
    out, _ = works("constitution", "--out", tmp_path / "data", "--prompts", 50)
    made = read(tmp_path / "data" / "start.jsonl", Demonstration).records
    assert len(made) == 50 and "gptcore sft --start MODEL" in out


def _short_context(config):
    config.write_text(
        config.read_text()
        .replace("context_length = 16", "context_length = 700")
        .replace("steps = 4", "steps = 2")
    )


def test_a_model_is_revised(tmp_path, works, book, config):
    _short_context(config)
    works("train", book, "--config", config, "--out", tmp_path / "run", "--quiet")
    works("constitution", "--out", tmp_path, "--prompts", 8)
    works(
        "sft", "--start", tmp_path / "run", tmp_path / "start.jsonl", "--out", tmp_path / "naive", "--steps", 2,
        "--set", "data.length=320", "--quiet",
    )  # fmt: skip
    out, _ = works(
        "constitution",
        tmp_path / "naive",
        "--out",
        tmp_path / "r",
        "--prompts",
        8,
        "--tokens",
        8,
        "--answers",
        2,
    )
    assert "helpfulness: broken by 4 of 8 answers, 0 after revision" in out
    assert "candour: broken by 4 of 8 answers, 0 after revision" in out
    assert len(read(tmp_path / "r" / "revisions.jsonl", Demonstration).records) == 8


def test_a_model_as_critic_says_how_often_it_agrees(tmp_path, works, book, config):
    config.write_text(config.read_text().replace("context_length = 16", "context_length = 700"))
    works("train", book, "--config", config, "--out", tmp_path / "run", "--quiet", "--steps", 2)
    works("constitution", "--out", tmp_path, "--prompts", 8)
    works(
        "sft", "--start", tmp_path / "run", tmp_path / "start.jsonl", "--out", tmp_path / "naive", "--steps", 1,
        "--set", "data.length=320", "--quiet",
    )  # fmt: skip
    out, _ = works(
        "constitution",
        tmp_path / "naive",
        "--out",
        tmp_path / "r",
        "--prompts",
        4,
        "--tokens",
        8,
        "--critic",
        "model",
    )
    assert "model and rule agree on: secrecy" in out
    for record in read(tmp_path / "r" / "rankings.jsonl", Ranking).records if "rankings.jsonl" in out else []:
        assert len(record.answers) <= 4


def test_mistakes_get_a_sentence(tmp_path, fails):
    assert fails("constitution", "--out", tmp_path, "--answers", 1).startswith(
        "got --prompts 1000, --answers 1"
    )
    assert "no run or checkpoint at" in fails("constitution", tmp_path / "nothing", "--out", tmp_path)
