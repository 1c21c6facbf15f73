"""A set grown by a model that was trained for seconds: what it adds is new, and every reject has a reason."""

from __future__ import annotations

import json

from bench import __main__ as bench
from bench import self_instruct as study
from gptcore.align import self_instruct


def test_seeds_are_of_modules_that_are_not_learnt():
    learnt, rest = study.lines_of("train"), study.lines_of("held_out")
    assert len(rest) >= study.SelfInstructSpec.seeds and len(learnt) > 1000
    assert all(3 <= len(line.split()) <= 14 and line.endswith(".") for line in (*learnt, *rest))


def test_a_toy_grows_and_counts_its_rejects(tmp_path, capsys):
    out, kept = tmp_path / "run", tmp_path / "record.json"
    assert bench.main(["self-instruct", "--toy", "--quiet", "--out", str(out), "--json", str(kept)]) in (0, 1)
    found = json.loads(kept.read_text())
    assert json.loads(capsys.readouterr().out.strip().split("\n")[-1]) == found
    grown = [json.loads(line)["instruction"] for line in (out / "grown.jsonl").read_text().splitlines()]
    assert len(grown) == found["kept"] == found["growth"][-1] <= study.TOY["count"]
    assert found["growth"] == sorted(found["growth"]) and len(found["growth"]) == found["rounds"] > 0
    assert set(found["rejected"]) <= set(self_instruct.REASONS)
    assert found["proposed"] == found["kept"] + sum(found["rejected"].values()) > 0
    assert not set(grown) & set(study.lines_of("train"))
    assert "Growth" in (out / "report.html").read_text()
    assert bench.main(["self-instruct", "--set", "countt=1"]) == 2
