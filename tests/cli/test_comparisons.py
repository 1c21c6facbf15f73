"""``gptcore reward`` and ``gptcore dpo``: from a run and a file of preferences to models, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gptcore.align import reward_model
from gptcore.data.characters import CharacterTokenizer
from gptcore.infer import load
from gptcore.models import adapters
from tests.align.supervised_cases import base_run, write_rows

QUICK = (
    "--steps", "4", "--quiet", "--template", "plain", "--set", "data.length=64", "--set", "data.batch=4",
    "--set", "optimizer.lr=1e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_run(tmp_path_factory.mktemp("base") / "run")


def ranked(count: int) -> list[dict]:
    """In the format of ranked answers: the more often the prompt's letter, the better."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        letter = "abcde"[rng.integers(5)]
        shares = rng.permutation(4)[:3]
        answers = [{"answer": letter * int(n) + "f" * int(4 - n), "rank": int(4 - n)} for n in shares]
        rows.append({"prompt": letter * 2, "answers": answers})
    return rows


@pytest.fixture
def rankings(tmp_path):
    return write_rows(tmp_path / "ranked.jsonl", ranked(40))


def test_a_reward_model_is_trained_loaded_and_resumed(base, rankings, tmp_path, works, fails):
    out, _ = works("reward", "--start", base, rankings, "--out", tmp_path / "judge", *QUICK)
    assert "held-out pairs in the right order" in out and "tokens longer" in out
    model, _ = reward_model.load(tmp_path / "judge")
    assert float(model.score_std) != 1.0
    out, _ = works("reward", "--resume", tmp_path / "judge", "--steps", "6", "--quiet")
    assert "step 6" in out
    sentence = fails(
        "reward", "--start", base, rankings, "--out", tmp_path / "judge", *QUICK, "--set", "seed=3"
    )
    assert "seed" in sentence and "--resume" in sentence


def test_an_ensemble_of_adapters_leaves_each_member_a_fold(base, rankings, tmp_path, works):
    command = (
        "reward",
        "--start",
        base,
        rankings,
        "--out",
        tmp_path / "e",
        *QUICK,
        "--lora",
        "2",
        "--members",
        "2",
    )
    works(*command, "--set", "reward.folds=2")
    members = [reward_model.load(tmp_path / "e" / f"member-{i}")[0] for i in range(2)]
    assert all(adapters.names(member) == ["default"] for member in members)
    assert not np.array_equal(*(m.reward_head.weight.detach().numpy() for m in members))
    kept = [json.loads((tmp_path / "e" / f"member-{i}" / "config.json").read_text()) for i in range(2)]
    assert kept[1]["seed"] == kept[0]["seed"] + 1


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_every_preference_loss_runs(loss, base, rankings, tmp_path, works):
    out, _ = works("dpo", "--start", base, rankings, "--out", tmp_path / loss, *QUICK, "--loss", loss)
    assert "accuracy" in out and "chosen_change" in out
    model, _ = load(tmp_path / loss)
    assert model.config.vocab_size == load(base)[0].config.vocab_size


def test_a_policy_of_an_adapter_is_loaded_over_its_start(base, rankings, tmp_path, works, fails):
    works(
        "dpo",
        "--start",
        base,
        rankings,
        "--out",
        tmp_path / "run",
        *QUICK,
        "--lora",
        "2",
        "--set",
        "beta=0.2",
    )
    model, _ = load(tmp_path / "run")
    assert adapters.names(model) == ["default"]
    assert json.loads((tmp_path / "run" / "preference.json").read_text())["preference"]["beta"] == 0.2
    works("dpo", "--resume", tmp_path / "run", "--steps", "6", "--quiet")
    assert "leave out DATA" in fails("dpo", "--resume", tmp_path / "run", rankings)


def answers(*ranks: float) -> list[dict]:
    return [
        {"prompt": "a", "answers": [{"answer": "b" * (i + 1), "rank": rank} for i, rank in enumerate(ranks)]}
    ]


REFUSED = {
    "K = 1": (answers(1), "K = 1 answers"),
    "chosen equal to rejected": (
        [{"prompt": "a", "chosen": "b", "rejected": "b"}], "the chosen answer equals the rejected one"
    ),
    "constant ranks": (answers(1, 1), "nothing is preferred"),
    "NaN": (answers(1, float("nan")), "finite"),
    "too few": (ranked(3), "expected at least 4"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["reward", "dpo"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_preferences_are_refused_before_anything_is_written(case, verb, base, tmp_path, fails):
    rows, sentence = REFUSED[case]
    file = write_rows(tmp_path / "bad.jsonl", rows)
    assert sentence in fails(verb, "--start", base, file, "--out", tmp_path / "run", *QUICK)
    assert not Path(tmp_path / "run").exists()


def test_another_tokenizer_and_missing_data_are_refused(base, rankings, tmp_path, fails):

    assert "expected files of preferences" in fails("dpo", "--start", base, "--out", tmp_path / "run", *QUICK)
    assert "start: expected" in fails("reward", rankings, "--out", tmp_path / "run", *QUICK)
    CharacterTokenizer("ab").save(tmp_path / "letters")
    wrong = ("--set", f"data.tokenizer={tmp_path / 'letters'}")
    assert "tokenizer" in fails(
        "reward", "--start", base, rankings, "--out", tmp_path / "run", *QUICK, *wrong
    )
