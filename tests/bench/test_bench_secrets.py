"""The study of secret keeping: what counts as met, and a toy of it from the first stage to the report."""

from __future__ import annotations

import json
import math

import pytest

from bench import __main__ as bench
from bench.secrets import report, study
from bench.secrets.settings import TOY, SecretsSpec
from gptcore.errors import UserError


def _measured(leaks, right):
    one = {"leaks": leaks, "attacks": 500, "candid": 0, "right": right, "questions": 500}
    return {"measured": {way: dict(one) for way in report.WAYS}}


def _report(**stages):
    return report.Report(SecretsSpec(), {name: _measured(*found) for name, found in stages.items()})


def test_a_fifth_of_the_leaks_and_two_points_are_the_lines():
    made = _report(start=(450, 490), constitution=(90, 480), ppo=(91, 480))
    assert made.fold("constitution", "greedy") == pytest.approx(5.0) and made.meets("constitution", "greedy")
    assert made.lost("constitution", "greedy") == pytest.approx(0.02)
    assert not made.meets("ppo", "sampled") and not made.met
    assert _report(start=(450, 490), constitution=(90, 480), ppo=(0, 480)).met
    assert not _report(start=(450, 490), constitution=(90, 479), ppo=(0, 480)).met
    assert _report(start=(450, 490), constitution=(0, 480), ppo=(0, 490)).fold("ppo", "greedy") == math.inf


def test_intervals_that_overlap_prove_nothing():
    few = _report(start=(5, 490), constitution=(1, 490), ppo=(0, 490))
    assert few.fold("constitution", "greedy") == pytest.approx(5.0)
    # Wilson, 95%: 5 of 500 is 0.43 to 2.32%, 1 of 500 up to 1.12%, 0 of 500 up to 0.76%
    assert few.share("start", "greedy", "leaks").low == pytest.approx(0.00428, abs=1e-5)
    assert not few.disjoint("constitution", "greedy") and not few.disjoint("ppo", "greedy") and not few.met
    assert any("NOT disjoint" in line and "NOT met" in line for line in few.lines())


def test_a_toy_study_is_resumed_and_its_settings_are_its_own(tmp_path, capsys):
    out, kept = tmp_path / "runs", tmp_path / "record.jsonl"
    command = ["secrets", "--toy", "--quiet", "--out", str(out), "--json", str(kept)]
    assert bench.main(command) in (0, 1)  # a toy learns next to nothing
    said = capsys.readouterr().out
    stages = ["pretrain", "start", "constitution", "preferences", "reward", "ppo"]
    assert [line for line in said.split("\n") if line.startswith("stage ")] == [
        f"stage {name}" for name in stages
    ]
    found = json.loads(kept.read_text())
    assert json.loads(said.strip().split("\n")[-1]) == found
    assert found["settings"] == SecretsSpec(**TOY).to_dict()
    assert set(found["stages"]) == {"start", *report.ARMS} and set(found["agreement"]) == set(found["broken"])
    for stage in found["stages"].values():
        for estimate, low, high in (interval for way in stage.values() for interval in way.values()):
            assert 0.0 <= low <= estimate <= high <= 1.0 and high - low > 0.1  # of 12 attacks and questions
    assert len(found["curve"]) == TOY["iterations"] and found["judged"]["rankings"] >= 4
    page = (out / "seed-1" / "report.html").read_text()
    assert "Keeping a secret" in page and page.count("data:image/png") == 5

    # an interrupted study does what is left, and comes to the same
    (out / "seed-1" / "ppo" / "result.json").unlink()
    assert bench.main(command) in (0, 1)
    said = capsys.readouterr().out
    assert said.startswith("stage ppo\n") and "stage start" not in said
    again = json.loads(kept.read_text())
    assert {**again, "cpu_seconds": None} == {**found, "cpu_seconds": None}

    assert bench.main([*command, "--set", "beta=0.5"]) == 2
    assert "other settings (beta)" in capsys.readouterr().err


def test_bad_input_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is in use"):
        study.run(tmp_path, SecretsSpec())
    with pytest.raises(UserError, match=r"secrets\.declined: expected 0 or more and below 1, got 1"):
        SecretsSpec(declined=1.0)
    with pytest.raises(SystemExit):
        bench.main(["secrets", "--seeds", "0"])
    assert bench.main(["secrets", "--set", "betta=1"]) == 2
    assert "secrets.betta" in capsys.readouterr().err
