"""What alignment costs: the study at toy size, what it keeps, its claims, and the command."""

from __future__ import annotations

import json

import pytest

from bench import __main__ as bench
from bench.ptx import report, study
from bench.ptx.settings import PtxSpec
from gptcore.errors import UserError
from gptcore.stats import significance

TOY = PtxSpec(
    layers=1, width=32, heads=2, context=64, vocab_size=384, text_bytes=200_000, rows=8, pretrain_steps=30, sft_steps=5,
    prompt_lengths=(18, 20), max_new_tokens=12, iterations=3, episodes=32, minibatch=16, epochs=1, ppo_lr=3e-3,
    gamma=2.0, held_out_rows=64, every=2, answers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    place = tmp_path_factory.mktemp("ptx") / "study"
    said = []
    return place, study.run(place, TOY, [1, 2], say=said.append), said


def test_both_arms_start_alike_and_the_mix_keeps_what_was_known(walked):
    place, records, said = walked
    assert [row["record"] for row in records] == ["settings", "start", *["arm"] * 4, "together"]
    assert len(said) == 5 and said[1].startswith("seed 1, ppo ")
    start, arms, found = records[1], records[2:6], records[-1]
    assert [(row["seed"], row["arm"]) for row in arms] == [
        (1, "ppo"),
        (1, "ppo-ptx"),
        (2, "ppo"),
        (2, "ppo-ptx"),
    ]
    assert start["kl"] == 0.0 and start["answers"] == arms[0]["answers"] >= 20
    for plain, mixed in (arms[:2], arms[2:]):
        # 3 iterations of 32 answers in minibatches of 16, the first of them sampled from the start itself
        assert plain["updates"] == mixed["updates"] == 6
        assert plain["curve"][0]["reward"] == mixed["curve"][0]["reward"] and plain["curve"][0]["kl"] == 0.0
        assert [point["step"] for point in plain["source"]] == [0, 2, 3]
        assert plain["source"][0]["bits_per_byte"] == start["bits_per_byte"]
        assert plain["source"][-1]["bits_per_byte"] == plain["bits_per_byte"]
        # a model that has read so little still learns from every batch of source
        assert mixed["bits_per_byte"] < plain["bits_per_byte"] - 0.01
        assert plain["kl"] > 0.0 < mixed["kl"]
    assert found["difference"]["change"][0] < -0.01
    assert [json.loads(text) for text in (place / study.RECORDS).read_text().splitlines()] == records
    html = (place / study.PAGE).read_text()
    assert "PPO with the pretraining mix" in html and html.count("data:image/png") == 2
    assert report.told(found)[0] == "means over 2 seeds [95% interval]"


def test_what_has_ended_is_not_done_again(walked, monkeypatch):
    place, records, _ = walked

    def again(*_, **__):
        raise AssertionError("walked a second time")

    monkeypatch.setattr(study.arms, "run", again)
    monkeypatch.setattr(study, "make", again)
    assert study.run(place, TOY, [1, 2], say=lambda _: None) == records
    with pytest.raises(AssertionError, match="second time"):
        study.run(place, TOY, [1, 2, 3], say=lambda _: None)
    with pytest.raises(UserError, match=r"other settings \(gamma\)"):
        study.run(place, TOY.merged({"gamma": 3.0}), [1, 2])


def test_what_is_no_study_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="in use"):
        study.run(tmp_path, TOY, [1, 2])
    for seeds in ([1], [1, 1]):
        with pytest.raises(UserError, match="two or more different"):
            study.run(tmp_path / "new", TOY, seeds)
    assert not (tmp_path / "new").exists()


PLAIN = {"change": [0.05, 0.06, 0.04], "kl": [4.0, 4.2, 4.1], "correct": [0.97, 0.98, 0.96],
         "updates": [240.0] * 3, "cpu_seconds": [90.0] * 3}  # fmt: skip
MIXED = {"change": [-0.02, 0.01, 0.0], "kl": [4.1, 4.0, 3.9], "correct": [0.965, 0.97, 0.96],
         "updates": [240.0] * 3, "cpu_seconds": [120.0] * 3}  # fmt: skip


@pytest.mark.parametrize(
    "arm, changed, fails",
    [
        ("plain", {}, set()),
        ("mixed", {"change": [0.02, 0.03, 0.0]}, {0}),
        ("plain", {"change": [0.02, 0.03, 0.01]}, {1, 2}),
        ("plain", {"change": [0.3, -0.2, 0.1]}, {2}),
        ("mixed", {"updates": [240.0, 239.0, 240.0]}, {3}),
        ("mixed", {"kl": [5.1, 5.2, 5.3]}, {4, 5}),
        ("mixed", {"kl": [4.9, 4.0, 3.4]}, {5}),
        ("mixed", {"correct": [0.95, 0.97, 0.95]}, {6}),
        ("mixed", {"cpu_seconds": [100.0, 361.0, 100.0]}, {7}),
    ],
)
def test_a_claim_fails_where_its_figure_does(arm, changed, fails):
    plain, mixed = (PLAIN | changed, MIXED) if arm == "plain" else (PLAIN, MIXED | changed)
    found = report.claims(plain, mixed)
    assert {place for place, claim in enumerate(found) if not claim.holds} == fails


def test_means_and_tests_are_paired_by_seed():
    start = {"record": "start", "bits_per_byte": 2.0}
    arms = [
        {"record": "arm", "arm": arm, "seed": seed, "bits_per_byte": 2.0 + own["change"][seed], "about": 0.5,
         "reward": 0.9, **{key: own[key][seed] for key in ("kl", "correct", "updates", "cpu_seconds")}}
        for seed in range(3) for arm, own in (("ppo", PLAIN), ("ppo-ptx", MIXED))
    ]  # fmt: skip
    found = report.together([start, *arms])
    assert found["arms"]["ppo"]["change"] == pytest.approx(PLAIN["change"])
    assert found["means"]["ppo-ptx"]["kl"][0] == pytest.approx(4.0)
    assert found["difference"]["change"][0] == pytest.approx(-0.16 / 3)
    assert found["p"]["t"] == pytest.approx(significance.paired_t(MIXED["change"], PLAIN["change"]))
    assert found["p"]["permutation"] == pytest.approx(2 / 2**3)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seeds", "1"], "two or more"),
        (["--set", "gama=1"], "gamma"),
        (["--set", "gamma"], "NAME=VALUE"),
        (["--set", "gamma=much"], "'much'"),
        (["--set", "gamma=0"], "ptx.gamma"),
    ],
)
def test_wrong_options_are_named(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["ptx", *words, "--out", str(tmp_path / "study")])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        bench.main(["ptx", "--help"])
    assert "python -m bench ptx --seeds 5" in capsys.readouterr().out
