"""``gptcore ppo``, ``grpo`` and ``expert-iteration`` from the command line."""

import json

import pytest

from gptcore.infer import load
from gptcore.train.metrics import read

TINY = """
[data]
batch = 2
length = 8
[optimizer]
lr = 1e-3
[evaluation]
every = 1
[checkpoint]
every = 1
[{section}]
episodes = 16
minibatch = 8
samples = 2
max_new_tokens = 4
"""


@pytest.fixture
def trained(tmp_path, config, works):
    """A tiny run to start from."""
    works("train", "--config", config, "--out", tmp_path / "base", tmp_path / "book.txt", "--quiet")
    return tmp_path / "base"


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "truth": str(i + 1)}) + "\n" for i in range(9)))
    return path


def settings(tmp_path, section):
    path = tmp_path / f"{section}.toml"
    path.write_text(TINY.format(section=section))
    return path


@pytest.mark.parametrize("verb", ["ppo", "grpo", "expert-iteration"])
def test_a_run_from_files_of_prompts(verb, tmp_path, trained, tasks, works):
    section = verb.replace("-", "_")
    judge = tmp_path / "judge.py"
    judge.write_text("def score(task, text):\n    return float(len(text)) + 0.1 * len(task.truth)\n")
    words = [
        verb, trained, tasks, "--config", settings(tmp_path, section), "--out", tmp_path / verb, "--quiet",
        "--reward", f"{judge}:score", "--gold", "exact", "--set", "tasks.held_out=3",
    ]  # fmt: skip
    out, _ = works(*words, "--steps", "2")
    assert (
        out.startswith("iteration 2: reward ") and "gold_reward 0.0000" in out and "val_reward_greedy" in out
    )
    lines = read(tmp_path / verb / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["evaluation", "train", "evaluation", "train", "evaluation"]
    told = [line for line in lines if line["kind"] == "evaluation"]
    assert all(line["val_gold_reward"] == 0.0 for line in told)
    works("report", tmp_path / verb)
    has_reference = verb != "expert-iteration"
    assert told[0].get("val_kl") == (0.0 if has_reference else None)
    page = (tmp_path / verb / "report.html").read_text()
    assert ("Gold and proxy reward" in page) == has_reference
    load(tmp_path / verb)
    assert works(*words, "--steps", "3")[0].startswith("iteration 3: reward ")


def test_pretraining_text_is_mixed_in(tmp_path, trained, tasks, works):
    words = [
        "ppo",
        trained,
        tasks,
        "--config",
        settings(tmp_path, "ppo"),
        "--out",
        tmp_path / "ptx",
        "--quiet",
    ]
    works(*words, "--text", tmp_path / "book.txt", "--set", "ppo.pretraining_coefficient=1", "--set", "steps=1",
          "--set", "tasks.held_out=3")  # fmt: skip
    lines = [line for line in read(tmp_path / "ptx" / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["pretraining_loss"] > 0.0 for line in lines] == [True]


def test_bad_input_is_one_sentence(tmp_path, trained, tasks, fails):
    config = settings(tmp_path, "ppo")
    base = ["ppo", trained, tasks, "--config", config, "--out", tmp_path / "bad"]
    assert "give the model to start from" in fails("ppo")
    assert fails(*base, "--set", "ppo.epoch=1").startswith("unknown key 'ppo.epoch'")
    assert "tasks.held_out: 256 of the 9 tasks" in fails(*base)
    small = [*base, "--set", "tasks.held_out=1"]
    assert "expected 'task', 'exact', FILE.py:FUNCTION" in fails(*small, "--reward", "nothing")
    assert "no file missing.py" in fails(*small, "--reward", "missing.py:score")
    assert "'task' is the reward of a built-in task" in fails(*small, "--reward", "task")
    assert "the prompt has 4 tokens, the context leaves room for 3" in fails(
        *small, "--set", "ppo.max_new_tokens=14"
    )
    assert fails("ppo", trained, "arithmetik").startswith(
        "unknown task 'arithmetik'; did you mean 'arithmetic'"
    )
    assert not (tmp_path / "bad").exists()


def test_a_reward_model_judges_and_begins_the_critic(tmp_path, trained, tasks, works, fails):
    rankings = tmp_path / "ranked.jsonl"
    answers = [{"answer": "2", "rank": 1}, {"answer": "33", "rank": 2}]
    rankings.write_text(
        "".join(json.dumps({"prompt": f"{i}+1=", "answers": answers}) + "\n" for i in range(8))
    )
    works(
        "reward", rankings, "--start", trained, "--out", tmp_path / "rm", "--steps", "2", "--template", "none",
        "--quiet", "--set", "data.length=16", "--set", "data.batch=4",
    )  # fmt: skip
    words = [
        "ppo", trained, tasks, "--config", settings(tmp_path, "ppo"), "--out", tmp_path / "rl", "--quiet",
        "--reward", tmp_path / "rm", "--set", "tasks.held_out=3", "--steps", "1",
    ]  # fmt: skip
    works(*words, "--set", f"tasks.critic={tmp_path / 'rm'}")
    line = next(line for line in read(tmp_path / "rl" / "metrics.jsonl") if line["kind"] == "train")
    assert line["reward_std"] > 0.0 and line["value_loss"] > 0.0
    no_judge = ["--set", f"tasks.critic={trained}", "--out", tmp_path / "x"]
    assert "differs" in fails(*words, *no_judge)
