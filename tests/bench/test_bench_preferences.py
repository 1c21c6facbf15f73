"""The study of preference losses at toy size: what is measured, what is kept, what is not done again."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from bench import __main__ as bench
from bench import preference_report, preferences
from bench import preference_stages as stages
from bench.preference_stages import METHODS, Judged, Sizes, Study
from gptcore.align.pairs import batch_of
from gptcore.align.preferences import PreferencePolicy, outputs_of, with_reference
from gptcore.align.tasks import arithmetic
from gptcore.errors import UserError
from gptcore.stats import roc
from gptcore.stats.significance import holm

TOY = Sizes(
    layers=1, width=32, heads=2, sft_steps=60, prompts=60, held_out=30, steps=2, batch=4, members=2, reward_steps=2
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All parts of one seed, what was said, and where."""
    out, said = tmp_path_factory.mktemp("study"), []
    rows = preferences.run(out, TOY, [1], say=said.append)
    return out, rows, said


def test_every_part_is_a_line_and_the_report_has_all(done):
    out, rows, said = done
    parts = ["start", *METHODS, "ensemble"]
    assert [row["part"] for row in rows] == parts and [line.split(": ")[1] for line in said] == parts
    kept = [json.loads(line) for line in (out / "preferences.jsonl").read_text().splitlines()]
    assert kept == rows and all(row["cpu_seconds"] > 0 for row in rows)
    for row in rows[1:-1]:
        assert 0 < row["p"] <= 1 and 0 <= row["after"] <= 1 and len(row["right"]["greedy"]) == TOY.held_out
        # what has a reference cannot tell answers apart at the start
        assert row["before"] == 0.5 or row["part"] in ("ORPO", "SimPO")
    page = (out / "preferences.html").read_text()
    assert page.count("data:image/png") == 5 and all(f"{name}, seed 1" in page for name in METHODS)
    words = preference_report.told(rows)
    assert sum(name in line for line in words for name in METHODS) >= 6 and "AUC" in words[-2]


def test_what_has_ended_is_not_done_again(done, tmp_path):
    out, rows, _ = done
    said: list[str] = []
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "preferences.jsonl"
    lines = record.read_text().splitlines()
    record.write_text("\n".join(lines[:3]) + "\n")  # stopped after DPO and IPO
    again = preferences.run(tmp_path, TOY, [1], say=said.append)
    assert said == [f"seed 1: {part}" for part in ("cDPO", "KTO", "ORPO", "SimPO", "ensemble")]
    timeless = [
        [{name: x for name, x in row.items() if name != "cpu_seconds"} for row in some]
        for some in (rows, again)
    ]
    assert timeless[0] == timeless[1]
    with pytest.raises(UserError, match="of a study of other sizes"):
        preferences.run(tmp_path, Sizes(), [1], say=said.append)
    record.write_text("{}\n")
    with pytest.raises(UserError, match="is no record of this study"):
        preferences.run(tmp_path, TOY, [1], say=said.append)


def test_labellers_and_members_share_nothing_they_should_not(done):
    study = Study(done[0] / "seed-1", TOY, 1)
    prompts = [{one.prompt for one in own} for own in study.labelled]
    assert all(prompts) and not prompts[0] & prompts[1]
    held_out = {task.prompt for task in study.tasks.held_out}
    assert {one.prompt for one in study.held_out} <= held_out and not held_out & set.union(*prompts)
    for one in study.held_out:  # the verifier's own grades
        task = arithmetic.task(*map(int, str(one.prompt)[:-1].split("+")))
        assert list(one.ranks) == [arithmetic.grade(task, answer) for answer in one.answers]


@pytest.mark.parametrize("name", METHODS)
def test_credits_are_what_the_losses_reward_says(name, done):
    study = Study(done[0] / "seed-1", TOY, 1)
    method = METHODS[name]
    held_out = with_reference(study.model(), stages.records(study, method.spec, study.held_out))
    policy = PreferencePolicy.over(study.model(), method.spec)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn(p.shape)
    got = stages.credit(policy, held_out)
    expected = []
    point = policy.of_update([batch_of(held_out)], list)["point"] if name == "KTO" else None
    for one in held_out:
        (out,) = outputs_of(policy, [one])
        if name == "KTO":
            ratio = (
                float(torch.cat([out.chosen_logprobs, out.rejected_logprobs]))
                - one.ref_chosen
                - one.ref_rejected
            )
            expected.append(float((ratio > point) == (one.chosen is not None)))
            continue
        a, b = float(out.chosen_logprobs), float(out.rejected_logprobs)
        if method.spec.referenced:
            a, b = a - one.ref_chosen, b - one.ref_rejected
        else:
            a, b = a / one.chosen.targets, b / one.rejected.targets
        expected.append(float(a > b))
    assert got.tolist() == expected and 0 < got.mean() < 1


def test_tests_are_adjusted_over_the_losses():
    right = {"greedy": [1, 0], "sampled": [1, 1]}
    rows = [{"seed": 1, "part": "start", "right": right, "cpu_seconds": 1.0}]
    for place, name in enumerate(METHODS):
        p = (place + 1) / 1000
        rows.append({"seed": 1, "part": name, "metric": "", "examples": 4, "before": 0.5, "after": 0.75, "p": p,
                     "right": right, "p_right": {"greedy": p, "sampled": 1.0}, "cpu_seconds": 1.0})  # fmt: skip
    found = preference_report.of_losses(rows)
    assert [row["p_holm"] for row in found] == holm([i / 1000 for i in range(1, 7)])
    assert found[0]["own"][1].estimate == 0.75 and found[0]["p_holm"] == pytest.approx(0.006)
    assert found[0]["verified"]["sampled"][0].estimate == 1.0


def test_the_curve_of_an_ensemble_has_the_area_of_its_roc():
    rng = np.random.default_rng(0)
    scores, error = rng.random(400), rng.random(400) < 0.2
    scores[error] += 0.3
    x, y = np.array(preferences._curve(scores, error)).T
    area = float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum())
    assert area == pytest.approx(roc.auc(scores, error).estimate, abs=0.01)
    fifths = preferences._fifths(Judged(-scores, scores, scores, error))
    assert [count for *_, count in fifths] == [80] * 5 and sum(
        errors for _, errors, _ in fifths
    ) == error.sum()
    assert math.isclose(fifths[0][0], np.sort(scores)[:80].mean())


def test_the_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["preferences", "--help"])
    assert stopped.value.code == 0 and "python -m bench preferences --seeds 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["preferences", "--seeds", "0"])
