"""The road over seeds: means and paired tests of what each seed reports, and the command that walks them."""

from __future__ import annotations

import json

import pytest

from bench import __main__ as bench
from bench import road
from gptcore.align.road.report import Report, Row
from gptcore.align.road.settings import RoadSpec
from gptcore.stats import significance
from gptcore.stats.intervals import wilson

STAGES = {
    "sft": (800, 600),
    "more_sft": (820, 700),
    "best-of": (None, 850),
    "ppo": (950, 900),
    "expert": (990, 980),
}


def _report(seed):
    rows = [
        Row(
            stage,
            stage,
            None if greedy is None else wilson(greedy + seed, 1000),
            wilson(sampled - seed, 1000),
            1.0,
        )
        for stage, (greedy, sampled) in STAGES.items()
    ]
    return Report(RoadSpec(seed=seed), tuple(rows), {}, (), wilson(9, 10))


def test_means_and_paired_tests_over_seeds():
    table = road.together([_report(seed) for seed in range(1, 9)])
    assert table["accuracies"]["ppo"]["greedy"] == pytest.approx([(950 + s) / 1000 for s in range(1, 9)])
    tests = table["tests"]
    assert set(tests) == {f"PPO against {name}, {way}" for name in ("SFT", "more SFT") for way in road.WAYS}
    # PPO is ahead by as much on all 8 seeds: of the 2^8 ways to exchange, 2 are as far from 0
    assert all(test["permutation"] == pytest.approx(2 / 256) for test in tests.values())
    noisy = [0.1, 0.3, 0.2, -0.1]
    assert significance.permutation(noisy, [0.0] * 4) > 0.2
    lines = road.told(table)
    assert any(
        line.startswith("ppo") and "greedy 95.5 [" in line and "sampled 89.5 [" in line for line in lines
    )
    assert any(line.startswith("best-of") and "greedy" not in line for line in lines)


def test_the_command_walks_each_seed_once_and_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    walked = []

    def run(directory, spec, quiet, say):
        walked.append((directory, spec))
        return _report(spec.seed)

    monkeypatch.setattr(road.road, "run", run)
    assert bench.main(["road", "--seeds", "3", "--out", str(tmp_path), "--fast"]) == 0
    assert [directory.name for directory, _ in walked] == ["seed-1", "seed-2", "seed-3"]
    assert [spec.seed for _, spec in walked] == [1, 2, 3] and walked[0][1].held_out == 600
    assert json.loads((tmp_path / "seeds.json").read_text())["seeds"] == 3
    assert "PPO against more SFT, sampled: p = 0.25 (permutation)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["road", "--seeds", "1"])
