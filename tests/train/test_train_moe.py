"""Training with experts: their losses in the gradient and in the metrics, a plot, a warning, capacity, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.dist import Member
from gptcore.models import GPT
from gptcore.nn import MoEStatistics
from gptcore.train import from_table, held_out
from gptcore.train.metrics import read
from gptcore.train.routing import RoutingWatch

from .test_train_loop import digest, same
from .toy import TINY_GPT, ToyLoader, settings, train

MOE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "capacity_factor": 1.0, "eval_capacity_factor": 0.0}


def table(run_dir: Path, moe: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    model = {**TINY_GPT, "moe": {**MOE, **(moe or {})}}
    return settings(run_dir, **{"steps": 6, "model": model, **changes})


def test_metrics_and_plot_of_every_layer(tmp_path: Path):
    train(table(tmp_path, data={"accumulate": 2}))
    lines = read(tmp_path / "metrics.jsonl")
    first = next(line for line in lines if line["kind"] == "train")
    model = GPT(from_table(table(tmp_path)).model_config(), seed=1337)
    outs = []
    for micro in (0, 1):
        batch = ToyLoader().batch_at(micro)
        outs.append(model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)))
    for key in ("loss", "balance_loss", "router_z_loss"):
        wanted = sum(float(getattr(out, key).detach()) for out in outs) / 2
        assert first[key] == pytest.approx(wanted, rel=1e-6), key
    routing = first["routing"]
    assert routing["layers"] == [0, 1]
    for key in ("drop_rate", "load", "entropy"):
        wanted_by_layer = [sum(float(getattr(out.routing[i], key)) for out in outs) / 2 for i in (0, 1)]
        assert routing[key] == pytest.approx(wanted_by_layer, rel=1e-6), key
    tops = [float(((outs[0].routing[i].share + outs[1].routing[i].share) / 2).max()) for i in (0, 1)]
    assert routing["top_share"] == pytest.approx(tops, rel=1e-6)
    assert min(routing["drop_rate"]) > 0.3  # each token makes two choices, for which there is half the room
    held = [line for line in lines if line["kind"] == "evaluation"]
    assert {line["val_drop_rate"] for line in held} == {0.0}, "evaluation has a capacity of its own"
    assert (tmp_path / "routing.png").read_bytes()[:4] == b"\x89PNG"


def test_dense_runs_have_none_of_it(tmp_path: Path):
    train(settings(tmp_path, steps=2, model=TINY_GPT))
    keys = {key for line in read(tmp_path / "metrics.jsonl") for key in line}
    assert not keys & {"routing", "balance_loss", "val_drop_rate"}
    assert not (tmp_path / "routing.png").exists()


def test_losses_of_the_router_are_trained_and_not_in_the_reported_loss(tmp_path: Path):
    lines = {}
    for name, moe in {"none": {"balance_weight": 0.0, "z_weight": 0.0}, "balance": {"balance_weight": 1.0},
                      "z": {"z_weight": 1.0}}.items():  # fmt: skip
        train(table(tmp_path / name, moe, steps=1))
        lines[name] = next(e for e in read(tmp_path / name / "metrics.jsonl") if e["kind"] == "train")
    assert len({line["loss"] for line in lines.values()}) == 1
    assert len({line["grad_norm"] for line in lines.values()}) == 3
    assert lines["none"]["balance_loss"] == lines["none"]["router_z_loss"] == 0.0


def test_balance_loss_balances(tmp_path: Path):
    """After 60 updates the load is nearer to 1 than without the loss, in every layer's mean over the last 20."""
    ends = []
    for weight in (0.0, 0.3):
        run_dir = tmp_path / str(weight)
        moe = {"balance_weight": weight, "z_weight": 0.0, "top_k": 1, "capacity_factor": 0.0}
        train(table(run_dir, moe, steps=60, evaluation={"every": 0}))
        loads = [e["routing"]["load"] for e in read(run_dir / "metrics.jsonl") if e["kind"] == "train"][-20:]
        ends.append([sum(column) / 20 for column in zip(*loads, strict=True)])
    assert all(balanced < free for free, balanced in zip(*ends, strict=True)), ends


def test_resuming_gives_the_same_bits_with_everything_random(tmp_path: Path):
    moe = {"noise": True, "jitter": 0.1, "dropout": 0.2, "priority": "random", "second_choice": "st_moe"}
    steady = {"schedule": {"name": "constant", "warmup": 0}, "checkpoint": {"every": 1}}
    train(table(tmp_path / "once", moe, **steady))
    train(table(tmp_path / "twice", moe, steps=3, **steady))
    train(table(tmp_path / "twice", moe, **steady))
    assert same(digest(tmp_path / "once"), digest(tmp_path / "twice"))
    once, twice = (
        [(e["loss"], e["routing"]) for e in read(tmp_path / name / "metrics.jsonl") if e["kind"] == "train"]
        for name in ("once", "twice")
    )
    assert once == twice and len(once) == 6


def test_a_collapsed_router_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A router of zeros sends every token to the expert of lowest index, and without a learning rate it stays so."""
    config = from_table(
        table(tmp_path, {"top_k": 1}, steps=110, optimizer={"lr": 0.0}, evaluation={"every": 0}, log_every=50)
    )
    model = GPT(config.model_config())
    with torch.no_grad():
        model.stack.blocks[1].mlp.router.weight.zero_()
        model.stack.blocks[0].mlp.router.weight.mul_(50)  # decided, not collapsed
    from gptcore.train import run

    run(
        config,
        model=model,
        loader=ToyLoader(),
        evaluate=held_out(ToyLoader(seed=1), 1),
        measure_peak=False,
        quiet=True,
    )
    warnings = [line for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "warning"]
    assert [line["step"] for line in warnings] == [100]
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "step 100: the router of block 1 has collapsed: expert 0 was the first choice of 100% of" in said


class _Out:
    def __init__(self, *shares: list[float]) -> None:
        zero = torch.zeros(())
        self.balance_loss = self.router_z_loss = zero
        self.routing = tuple(MoEStatistics(zero, zero, zero, zero, zero, torch.tensor(s)) for s in shares)


def sentences(watch: RoutingWatch, updates: int, *shares: list[float]) -> list[str]:
    found = []
    for _ in range(updates):
        watch.add(_Out(*shares))
        found += watch.updated(Member(None, 0, 1))
    return found


def test_what_counts_as_a_collapse():
    watch = RoutingWatch([3, 7])
    balanced, collapsed, other = [0.25] * 4, [0.1, 0.6, 0.2, 0.1], [0.6, 0.2, 0.1, 0.1]
    assert not sentences(watch, 99, balanced, collapsed)
    (sentence,) = sentences(watch, 1, balanced, collapsed)
    assert sentence.startswith("the router of block 7 has collapsed: expert 1 was the first choice of 60%")
    assert not sentences(watch, 300, balanced, collapsed)  # said once
    assert not sentences(watch, 1, balanced, balanced) and sentences(watch, 100, balanced, collapsed)  # again
    for _ in range(10):  # another expert each time is no collapse of the router
        assert not sentences(watch, 50, other, balanced) and not sentences(watch, 50, collapsed, balanced)
    two = RoutingWatch([0])
    assert not sentences(two, 200, [0.6, 0.4]) and sentences(two, 100, [0.8, 0.2])
    assert not sentences(RoutingWatch([0]), 200, [1.0])
