"""The whole road at a size that takes seconds: every stage runs, what was stopped goes on to the same numbers."""

import json

import pytest

from gptcore.align.road import run as road
from gptcore.align.road.settings import FAST, RoadSpec
from gptcore.errors import UserError

TINY = {
    "layers": 1, "width": 16, "heads": 2, "held_out": 50, "batch": 2, "length": 64, "pretrain_steps": 2,
    "demonstrations": 50, "sft_steps": 3, "ranked_prompts": 30, "reward_steps": 2, "reward_batch": 4,
    "ppo_iterations": 3, "episodes": 16, "minibatch": 8, "epochs": 1, "expert_rounds": 2, "expert_prompts": 20,
    "expert_samples": 2, "best_of": 2,
}  # fmt: skip
SETTINGS = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    place = tmp_path_factory.mktemp("road") / "road"
    return place, road.run(place, RoadSpec.from_dict(TINY), quiet=True, say=lambda text: None)


def _numbers(report):
    table = report.to_dict()
    for row in table["rows"]:
        del row["seconds"]
    return table


def test_every_stage_is_measured_and_tested(walked):
    place, report = walked
    assert [row.stage for row in report.rows] == ["sft", "more_sft", "best-of", "ppo", "expert"]
    assert set(report.tests) == {f"{a}, {b}" for a in ("SFT", "more SFT") for b in ("greedy", "sampled")}
    assert all(0.0 <= p <= 1.0 for p in report.tests.values())
    assert [point["step"] for point in report.curve] == [1, 2, 3]
    assert abs(report.curve[0]["kl"]) < 1e-4  # the policy is the reference before its first update
    page = (place / "report.html").read_text()
    assert "data:image/png;base64," in page and "PPO on the reward model" in page and "http" not in page
    assert json.loads((place / "report.json").read_text())["tests"] == dict(report.tests)


def test_a_road_that_was_stopped_goes_on_to_the_same_numbers(walked, tmp_path):
    def stops_at(stage):
        def say(text):
            if stage in text:
                raise KeyboardInterrupt

        return say

    spec = RoadSpec.from_dict(TINY)
    said = []
    for stage in ("sft", "ppo", "more_sft"):
        with pytest.raises(KeyboardInterrupt):
            road.run(tmp_path / "road", spec, quiet=True, say=stops_at(f": {stage}"))
    report = road.run(tmp_path / "road", spec, quiet=True, say=said.append)
    assert _numbers(report) == _numbers(walked[1])
    assert [line.split(": ")[1].split(",")[0] for line in said] == ["more_sft", "expert"]


def test_a_road_is_not_walked_twice_nor_with_other_settings(walked, works, fails):
    place = walked[0]
    out, _ = works("road", "--out", place, *SETTINGS, "--quiet")
    assert "stage" not in out and "held-out exact match over 50 prompts" in out
    assert "other settings (held_out)" in fails("road", "--out", place, *SETTINGS, "--set", "held_out=51")


def test_bad_settings_get_a_sentence(tmp_path, fails):
    assert "did you mean 'road.ppo_lr'" in fails("road", "--out", tmp_path / "r", "--set", "ppo_ls=1")
    assert fails("road", "--out", tmp_path / "r", "--set", "k=1").startswith("road.k")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert "is in use" in fails("road", "--out", tmp_path / "full")
    with pytest.raises(UserError, match="noise"):
        RoadSpec(noise=2.0)
    assert RoadSpec.from_dict(FAST).held_out == FAST["held_out"]
