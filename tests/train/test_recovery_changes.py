"""Changes of a run under way: each at its step, with the state carried, logged, resumed and replayed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.optim import SGD, AdamW, decay_groups
from gptcore.train import events, from_table, run
from gptcore.train.metrics import read
from gptcore.train.recovery_changes import switched
from gptcore.train.recovery_replay import change_of, changes_of, replayed
from gptcore.train.recovery_spec import Change

from .test_resume import kill_and_resume
from .toy import Toy, ToyLoader, settings

CHANGES = [
    {"step": 8, "lr": 0.002},
    {"step": 12, "max_norm": 0.05},
    {"step": 16, "optimizer": "sgd", "lr": 0.5},
    {"step": 27, "optimizer": "adamw", "lr": 0.004, "max_norm": 1.0},
    {"step": 33, "lr_factor": 0.5},
]


def train(run_dir: Path, **changes: Any) -> Toy:
    model = Toy()
    config = from_table(settings(run_dir, **changes))
    run(config, model=model, loader=ToyLoader(), measure_peak=False, quiet=True)
    return model


def same_end(a: Path, b: Path) -> bool:
    one, two = (checkpoint.load(path / "checkpoints")[0] for path in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read(run_dir / "metrics.jsonl") if line["kind"] == "train"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_opts_changes_replayed_from_the_log_give_the_same_bits(
    tmp_path: Path, dtype: str, split: bool
) -> None:
    table = {"dtype": dtype, "optimizer": {"split_master": split}}
    train(tmp_path / "run", changes=CHANGES, **table)
    again = replayed(from_table(settings(tmp_path / "again", **table)), tmp_path / "run" / "events.jsonl")
    run(again, model=Toy(), loader=ToyLoader(), measure_peak=False, quiet=True)
    assert same_end(tmp_path / "run", tmp_path / "again")
    logs = [events.read(tmp_path / name / "events.jsonl") for name in ("run", "again")]
    assert logs[0] == logs[1] and [e["step"] for e in logs[0]] == [c["step"] for c in CHANGES]
    train(tmp_path / "without", **table)
    assert not same_end(tmp_path / "run", tmp_path / "without")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_change_alone_changes_the_end_and_is_replayed(tmp_path: Path, dtype: str) -> None:
    """So that none of them is there only in the log."""
    train(tmp_path / "plain", dtype=dtype)
    for number, change in enumerate(
        CHANGES[:3] + [{"step": 5, "skip_batches": 7}, {"step": 5, "drop_update": True}]
    ):
        path = tmp_path / str(number)
        train(path, dtype=dtype, changes=[change])
        assert not same_end(path, tmp_path / "plain")
        assert changes_of(path / "events.jsonl") == [Change.from_dict(change)]


@pytest.mark.parametrize("stop", [7, 8, 9, 16, 17, 26, 27, 28, 39])
def test_a_run_resumed_between_changes_has_the_same_bits(tmp_path: Path, stop: int) -> None:
    """Stopped before, at and after changes, also while SGD has Adam's state in keeping."""
    constant = {"schedule": {"name": "constant"}}  # which does not depend on the number of steps
    train(tmp_path / "straight", changes=CHANGES, **constant)
    train(tmp_path / "parts", steps=stop, changes=CHANGES, **constant)
    train(tmp_path / "parts", changes=CHANGES, **constant)
    assert same_end(tmp_path / "straight", tmp_path / "parts")
    logs = [events.read(tmp_path / name / "events.jsonl") for name in ("straight", "parts")]
    assert logs[0] == logs[1]


@pytest.mark.long
def test_a_run_killed_between_changes_has_the_same_bits_and_the_same_log(tmp_path: Path) -> None:
    """A change every 40 updates, so that each of three kills falls between others, some while SGD has the state."""
    changes = [
        {"step": 40 * n, **part}
        for n, part in enumerate([{"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adamw", "lr": 0.01}] * 5)
    ]
    kill_and_resume(tmp_path, 3, changes=changes)
    logs = [events.read(tmp_path / name / "events.jsonl") for name in ("straight", "killed")]
    assert logs[0] == logs[1] and len(logs[0]) == len(changes)


def test_changes_made_stay_when_a_run_goes_on_without_them_in_its_settings(tmp_path: Path) -> None:
    constant = {"schedule": {"name": "constant"}}
    train(tmp_path / "straight", changes=CHANGES[:3], **constant)
    train(tmp_path / "parts", steps=20, changes=CHANGES[:3], **constant)
    train(tmp_path / "parts", **constant)
    assert same_end(tmp_path / "straight", tmp_path / "parts")


def test_a_change_in_the_past_is_refused(tmp_path: Path) -> None:
    train(tmp_path, steps=20)
    with pytest.raises(UserError, match="changes: step 10 is over, the run goes on at step 20"):
        train(tmp_path, changes=[{"step": 10, "lr": 0.1}])


def test_the_rate_goes_through_what_was_asked_and_keeps_the_schedule_s_form(tmp_path: Path) -> None:
    """lr is exact at its update; everywhere after it is the schedule times one factor; lr_factor multiplies that."""
    train(tmp_path, changes=[{"step": 8, "lr": 0.002}, {"step": 20, "lr_factor": 0.5}])
    config = from_table(settings(tmp_path))
    found = lines(tmp_path)
    factor = 0.002 / config.learning_rate(8)
    for step in range(40):
        want = config.learning_rate(step) * (1 if step < 8 else factor if step < 20 else factor / 2)
        assert found[step + 1]["lr"] == pytest.approx(want, rel=1e-15)
    assert found[9]["lr"] == pytest.approx(0.002, rel=1e-15)


def test_clipping_changes_the_update_not_the_reported_norm(tmp_path: Path) -> None:
    """Up to the change two runs agree in every bit; then the clipped one moves by at most lr max_norm under SGD."""
    sgd = {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "max_norm": 0.0}, "steps": 21}
    clipped = train(tmp_path / "clipped", changes=[{"step": 20, "max_norm": 0.01}], **sgd)
    train(tmp_path / "plain", **sgd)
    before, after = (lines(tmp_path / name) for name in ("clipped", "plain"))
    assert [before[s]["loss"] for s in range(1, 22)] == [after[s]["loss"] for s in range(1, 22)]
    assert before[21]["grad_norm"] == after[21]["grad_norm"] > 0.01
    start = checkpoint.load(checkpoint.path_of(tmp_path / "clipped" / "checkpoints", 20))[0]
    moved = sum(
        float((p.detach().double() - start[f"model/{name}"].double()).square().sum())
        for name, p in clipped.named_parameters()
    )
    assert moved**0.5 == pytest.approx(before[21]["lr"] * 0.01, rel=1e-4)


def test_sgd_takes_over_adams_mean_and_gives_it_back(tmp_path: Path) -> None:
    """One step of each after the switch, in float64 from the state before; what SGD does not use stays as it is."""
    torch.manual_seed(0)
    config = from_table(settings(tmp_path))
    model = Toy(dropout=0.0)
    adam = AdamW(decay_groups(model, 0.1), lr=0.01, betas=(0.9, 0.95), max_norm=0.5)

    def gradients() -> None:
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3  # of a norm below the clip

    for _ in range(3):
        gradients()
        adam.step()
    kept = {p: {name: value.clone() for name, value in adam.state[p].items()} for p in model.parameters()}
    sgd = switched(adam, config)
    assert isinstance(sgd, SGD) and sgd.max_norm == 0.5
    decay = {p: group["weight_decay"] for group in sgd.param_groups for p in group["params"]}
    assert sorted(set(decay.values())) == [0.0, 0.1]
    for group in sgd.param_groups:
        group["lr"] = 0.3
    gradients()
    before = {p: p.detach().double() for p in model.parameters()}
    sgd.step()
    for p in model.parameters():
        assert p.grad is not None
        mean = 0.9 * kept[p]["exp_avg"].double() + 0.1 * (p.grad.double() + decay[p] * before[p])
        torch.testing.assert_close(p.detach().double(), before[p] - 0.3 * mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(sgd.state[p]["momentum_buffer"].double(), mean, rtol=1e-5, atol=1e-9)
    means = {p: sgd.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    back = switched(sgd, config)
    assert isinstance(back, AdamW) and back.param_groups[0]["betas"] == (0.9, 0.95)
    for p in model.parameters():
        assert torch.equal(back.state[p]["exp_avg"], means[p])
        assert torch.equal(back.state[p]["exp_avg_sq"], kept[p]["exp_avg_sq"])
        assert back.state[p]["step"] == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adam_after_sgd_from_the_start_begins_afresh(tmp_path: Path, dtype: str) -> None:
    """Its moments and its count are those of its own updates, the 15 after the change."""
    changes = [{"step": 0, "optimizer": "sgd", "lr": 0.1}, {"step": 5, "optimizer": "adamw", "lr": 0.01}]
    train(tmp_path, steps=20, dtype=dtype, changes=changes)
    tensors = checkpoint.load(tmp_path / "checkpoints")[0]
    assert tensors["optimizer/embedding/step"] == 15
    assert not any(name.endswith("momentum_buffer") for name in tensors)
    assert float(tensors["optimizer/embedding/exp_avg_sq"].max()) > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step": 3}, "changes: step 3 changes nothing; give one of lr, lr_factor, max_norm"),
        ({"lr": 0.1}, "changes: each needs a step"),
        ({"step": 3, "lr": 0.1, "lr_factor": 2.0}, "changes: step 3 has both lr and lr_factor"),
        ({"step": 3, "lr": -0.1}, "changes.lr: expected 0 or more, got -0.1"),
        ({"step": 3, "learning_rate": 0.1}, "unknown key 'changes.learning_rate'"),
        ({"step": 3, "loss_scale": 1024.0}, "changes: step 3: loss_scale: float32 is trained without a loss scale"),
        ({"step": 3, "optimizer": "adam"}, "changes: step 3: optimizer adam: a run with Adam or AdamW can change to"),
    ],
)  # fmt: skip
def test_changes_that_cannot_be_made_are_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        train(tmp_path, changes=[change])
    assert not (tmp_path / "checkpoints").exists()


def test_an_optimizer_without_a_way_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this one has adafactor"):
        train(tmp_path, optimizer={"name": "adafactor"}, changes=[{"step": 3, "optimizer": "sgd"}])


def test_a_change_as_typed() -> None:
    assert change_of("step=1200,lr=3e-5") == Change(step=1200, lr=3e-5)
    assert change_of("step=5, optimizer=sgd, max_norm=1") == Change(step=5, optimizer="sgd", max_norm=1.0)
    assert change_of("step=5,drop_update=true") == Change(step=5, drop_update=True)
    for text, sentence in (
        ("1200", "--change 1200: expected step=N and what changes"),
        ("step=x,lr=1", "changes.step: expected an integer, got 'x'"),
        ("step=1,optimizer=sdg", "did you mean 'sgd'"),
    ):
        with pytest.raises(UserError, match=sentence):
            change_of(text)


def test_no_log_to_replay_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no event log at"):
        replayed(from_table(settings(tmp_path)), tmp_path / "events.jsonl")


def test_a_rewind_in_a_log_undoes_what_came_after_it(tmp_path: Path) -> None:
    """Changes beyond it count again when the log has them again; what an earlier rewind skipped there stays skipped."""
    from gptcore.train.events import EventLog

    log = EventLog(tmp_path / "events.jsonl", 0)
    log.write("done", 10, action="change", lr=0.1)
    log.write("done", 20, action="change", skip_batches=5)
    log.write("done", 25, action="skip")
    log.write("done", 20, action="rewind", from_step=30, skip_batches=40, first_batch=20)
    log.write("done", 20, action="change", skip_batches=5)
    log.write("done", 20, action="rewind", from_step=24, skip_batches=41, first_batch=60)
    log.write("done", 20, action="change", skip_batches=5)
    log.write("done", 33, action="skip")
    log.close()
    assert changes_of(tmp_path / "events.jsonl") == [
        Change(step=10, lr=0.1),
        Change(step=20, skip_batches=40),
        Change(step=20, skip_batches=41),
        Change(step=20, skip_batches=5),
        Change(step=32, drop_update=True),
    ]
