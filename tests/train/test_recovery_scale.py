"""The loss scale of a float16 run: changed under way; a collapse that is seen, gone back from and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.models import GPT
from gptcore.optim import LossScaler
from gptcore.train import SpikeError, events, from_table, run
from gptcore.train.guard import Guard, Sighting
from gptcore.train.recovery_replay import changes_of, replayed
from gptcore.train.recovery_spec import Change, RecoverySpec

from .test_float16 import Injecting, losses_of, trained
from .toy import TINY_GPT, settings

CHANGE = {"step": 12, "loss_scale": 64.0}
OVERFLOWS = range(12, 20)
# The scale is 2,048 from the 9th update on; the third overflow leaves an eighth of it.
FALLS = {"scale_fall": 8.0, "rewind_steps": 2, "skip_batches": 20}


def again(path: Path, log: Path, overflows: range, **changes: Any) -> None:
    """What ``trained`` does, with the decisions of ``log``."""
    table = settings(path, **{
        "model": {**TINY_GPT, "dropout": 0.1}, "dtype": "float16",
        "loss_scale": {"init_scale": 1024.0, "growth_interval": 9},
        "schedule": {"name": "constant"}, "evaluation": {"every": 0}, **changes,
    })  # fmt: skip
    config = replayed(from_table(table), log)
    model = GPT(config.model_config(), seed=config.seed)
    run(config, model=model, loader=Injecting(model, overflows), measure_peak=False, quiet=True)


def same_end(a: Path, b: Path) -> bool:
    (one, its), (two, others) = (checkpoint.load(path / "checkpoints") for path in (a, b))
    tensors = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return tensors and its["loss_scale"] == others["loss_scale"]


def told(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events.read(path / "events.jsonl") if event["kind"] == kind]


def test_a_changed_scale_is_that_of_the_next_update(tmp_path: Path) -> None:
    """It grows from there after nine more updates; the log, a replay and resumed runs have the same."""
    trained(tmp_path / "run", range(0), changes=[CHANGE])
    scales = {step: line["loss_scale"] for step, line in losses_of(tmp_path / "run").items()}
    # Metrics name the scale after an update: 2,048 since the 9th, 64 until nine are through.
    assert [scales[step] for step in (8, 9, 12, 13, 20, 21, 30)] == [1024, 2048, 2048, 64, 64, 128, 256]
    assert told(tmp_path / "run", "done") == [{"kind": "done", "action": "change", **CHANGE}]
    assert changes_of(tmp_path / "run" / "events.jsonl") == [Change.from_dict(CHANGE)]
    again(tmp_path / "again", tmp_path / "run" / "events.jsonl", range(0))
    assert same_end(tmp_path / "run", tmp_path / "again")
    for stop in (11, 12, 13, 17):
        trained(tmp_path / str(stop), range(0), changes=[CHANGE], steps=stop)
        trained(tmp_path / str(stop), range(0), changes=[CHANGE])
        assert same_end(tmp_path / "run", tmp_path / str(stop))
    trained(tmp_path / "without", range(0))
    assert not same_end(tmp_path / "run", tmp_path / "without")


def test_a_collapse_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, OVERFLOWS, recovery=FALLS)
    seen = [event for event in told(tmp_path, "seen") if event["detector"] == "loss_scale"]
    assert seen == [{"step": 15, "kind": "seen", "detector": "loss_scale", "value": 256.0, "usual": 2048.0}]
    decided = {"step": 15, "kind": "decided", "detector": "loss_scale", "policy": "warn", "onset": 13}
    assert told(tmp_path, "decided") == [decided]
    sentence = "step 15: the loss scale has fallen to 256, from 2048 not long ago"
    assert capsys.readouterr().err.count(sentence) == 1


def test_a_collapse_is_gone_back_from_and_replayed(tmp_path: Path) -> None:
    """To the checkpoint whose scale was whole, and past the batches that overflow: the scale never falls again."""
    rewinds = {**FALLS, "loss_scale": "rewind"}
    keeps = {"checkpoint": {"every": 5, "keep_last": 3}}
    trained(tmp_path / "run", OVERFLOWS, recovery=rewinds, **keeps)
    done = [(e["action"], e["from_step"], e["step"]) for e in told(tmp_path / "run", "done")]
    assert done == [("rewind", 15, 10)]
    scales = [line["loss_scale"] for line in losses_of(tmp_path / "run").values()]
    assert scales == sorted(scales) and scales[0] == 1024 and scales[-1] == 1024 * 2**4
    again(tmp_path / "again", tmp_path / "run" / "events.jsonl", OVERFLOWS, **keeps)
    assert same_end(tmp_path / "run", tmp_path / "again")
    for stop in (14, 16):  # interrupted, one of them before the decision
        constant = {"recovery": rewinds, **keeps}
        trained(tmp_path / str(stop), OVERFLOWS, **constant, steps=stop)
        trained(tmp_path / str(stop), OVERFLOWS, **constant)
        assert same_end(tmp_path / "run", tmp_path / str(stop))


def test_a_collapse_can_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(SpikeError, match="step 15: the loss scale has fallen to 256, from 2048 not long ago"):
        trained(tmp_path, OVERFLOWS, recovery={**FALLS, "loss_scale": "stop"})


def test_a_scale_that_begins_too_high_is_no_collapse() -> None:
    """Nor is a fall by less, or one that took longer than the window; the highest is of applied updates."""
    guard = Guard(RecoverySpec(window=8, least=8, scale_fall=16.0))
    scale = 2.0**30
    for step in range(20):
        assert guard.look_at_scale(step, scale, scale / 2, True) == []
        scale /= 2
    assert guard.look_at_scale(20, scale, scale, False) == []
    assert guard.look_at_scale(21, scale, scale / 8, True) == []
    assert guard.look_at_scale(22, scale / 8, scale / 16, True) == [
        Sighting("loss_scale", scale / 16, usual=scale)
    ]
    restored = Guard(RecoverySpec(window=8, least=8, scale_fall=16.0))
    restored.restore(guard.state())
    assert restored.scales.highest() == guard.scales.highest() == (20, scale)
    for step in range(23, 31):
        guard.look_at_scale(step, scale / 16, scale / 16, False)
    assert guard.look_at_scale(31, scale / 16, scale / 16, False) == []
    off = Guard(RecoverySpec(loss_scale="off"))
    off.look_at_scale(0, 2.0**16, 2.0**16, False)
    assert off.look_at_scale(1, 2.0**16, 1.0, True) == []


def test_scales_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"changes: step 3: loss_scale: LossScaler: argument 'scale': got 2.0, expected 4.0"
    ):
        trained(
            tmp_path, range(0), changes=[{"step": 3, "loss_scale": 2.0}],
            loss_scale={"init_scale": 64.0, "minimum": 4.0},
        )  # fmt: skip
    with pytest.raises(ValueError, match="argument 'scale': got inf, expected 1.0"):
        LossScaler().restart(float("inf"))
    with pytest.raises(UserError, match="recovery.scale_fall: expected 2.0 or more, got 1.5"):
        from_table({"recovery": {"scale_fall": 1.5}})
    with pytest.raises(UserError, match=r"recovery.loss_scale: rewind needs checkpoints"):
        from_table({"recovery": {"loss_scale": "rewind"}, "checkpoint": {"every": 0}})
