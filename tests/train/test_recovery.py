"""A run that meets a spike or a NaN goes back, skips the data, and ends where a clean one does; its log tells it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.train import NonFiniteError, SpikeError, checkpoints_kept, events, from_table
from gptcore.train.metrics import read
from gptcore.train.recovery_replay import changes_of, replayed

from .spikes import Corrupted, PoisonedGPT, TextLoader, table, train
from .toy import Toy, ToyLoader, settings

# Runs whose data differ only by their seed end within 0.6% of each other with these (three seeds, measured).
CALM = {"optimizer": {"lr": 1e-3}, "schedule": {"floor": 0.0}, "data": {"batch": 16}}


def told(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events.read(run_dir / "events.jsonl") if event["kind"] == kind]


def same_end(a: Path, b: Path) -> bool:
    """Weights, moments, masters and generators of two runs, bit for bit."""
    one, two = (checkpoint.load(path / "checkpoints")[0] for path in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> float:
    return train(table(tmp_path_factory.mktemp("clean"), **CALM), TextLoader(batch=16))[1]


def test_a_spike_is_found_gone_back_from_and_gone_round(tmp_path: Path, clean: float) -> None:
    """70 batches with targets of another text, to the end of the run: 1% is what recovery must keep to.

    The same run without recovery ends more than 1% off, so the bound can fail.
    """
    bad = range(230, 300)
    warned = {"recovery": {"loss": "warn"}}
    damaged = train(table(tmp_path / "damaged", **CALM, **warned), Corrupted(bad, batch=16))[1]
    loader = Corrupted(bad, batch=16)
    ended = train(table(tmp_path / "run", **CALM), loader)[1]
    assert abs(ended / clean - 1) < 0.01 < damaged / clean - 1
    decided, done = told(tmp_path / "run", "decided"), told(tmp_path / "run", "done")
    rewind = {"step": 233, "kind": "decided", "detector": "loss", "policy": "rewind", "onset": 231}
    assert decided == [{**rewind, "to_step": 100, "skip_batches": 200}]
    assert rewind["step"] - bad.start <= 5
    assert done == [
        {"step": 100, "kind": "done", "action": "rewind", "from_step": 233, "skip_batches": 200, "first_batch": 100}
    ]  # fmt: skip
    assert loader.served == [*range(233), *range(300, 500)]


def test_metrics_keep_undone_updates_apart(tmp_path: Path) -> None:
    bad = range(150, 160)
    train(table(tmp_path, steps=170, recovery={"rewind_steps": 40}), Corrupted(bad))
    steps = [line["step"] for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 171))
    undone = [line for line in read(tmp_path / "metrics-undone-1.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in undone] == list(range(81, 154))
    assert max(line["loss"] for line in undone) > 2 * min(line["loss"] for line in undone)
    texts = [line["text"] for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "warning"]
    assert texts[0].startswith("went back from step 153 to step 80 and skipped the data of 200 updates")


def test_a_nan_is_gone_back_from_by_default(tmp_path: Path, clean: float) -> None:
    config = table(tmp_path, **CALM)
    del config["recovery"]
    model = PoisonedGPT(from_table(config).model_config(), seed=1337, calls=261)
    ended = train(config, TextLoader(batch=16), model)[1]
    assert abs(ended / clean - 1) < 0.01
    seen, decided = told(tmp_path, "seen")[-1], told(tmp_path, "decided")
    assert (seen["step"], seen["detector"], seen["value"]) == (261, "non_finite", "nan")
    assert [(d["step"], d["detector"], d["to_step"]) for d in decided] == [(261, "non_finite", 100)]


def test_data_that_spike_for_longer_are_gone_round_again(tmp_path: Path) -> None:
    """After the first skip the run meets the rest of them at once, and skips from there."""
    loader = Corrupted(range(130, 360))
    train(table(tmp_path, steps=180), loader)
    rewinds = [(e["from_step"], e["step"], e["skip_batches"]) for e in told(tmp_path, "done")]
    assert rewinds == [(133, 100, 200), (103, 100, 200)]
    assert loader.served == [*range(133), *range(300, 303), *range(500, 580)]


def test_rewinds_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(SpikeError, match=r"step 103: the loss is .* above .*; after 1 rewinds") as caught:
        train(table(tmp_path, recovery={"max_rewinds": 1}), Corrupted(range(130, 3000)))
    assert "robust standard deviations" in str(caught.value)
    assert told(tmp_path, "decided")[-1]["reason"] == "after 1 rewinds"
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 100


def test_without_a_checkpoint_a_nan_stops_and_a_spike_does_not(tmp_path: Path) -> None:
    off = {"recovery": {"loss": "off"}}
    config = table(tmp_path / "nan", steps=60, checkpoint={"every": 0}, **off)
    model = PoisonedGPT(from_table(config).model_config(), calls=50)
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 50 .*; no checkpoint to go back to"):
        train(config, model=model)
    train(table(tmp_path / "spike", steps=60, checkpoint={"every": 99}), Corrupted(range(50, 54)))
    decided = [(d["step"], d["policy"], d["reason"]) for d in told(tmp_path / "spike", "decided")]
    assert decided == [(53, "warn", "no checkpoint to go back to")]


@pytest.mark.parametrize("detector", ["loss", "grad_norm"])
def test_a_skipped_update_touches_no_weight(tmp_path: Path, detector: str) -> None:
    """The run with the bad batches skipped has the bits of one that was told to drop those updates."""
    bad = range(60, 63)
    off = {"loss": "off", "grad_norm": "off"}
    config = table(tmp_path / "run", steps=80, recovery={**off, detector: "skip"})
    train(config, Corrupted(bad))
    skipped = [e["step"] for e in told(tmp_path / "run", "done")]
    assert {61, 62, 63} <= set(skipped)
    changes = [{"step": step - 1, "drop_update": True} for step in skipped]
    train(table(tmp_path / "told", steps=80, recovery=off, changes=changes), Corrupted(bad))
    assert same_end(tmp_path / "run", tmp_path / "told")
    train(table(tmp_path / "not", steps=80, recovery=off), Corrupted(bad))
    assert not same_end(tmp_path / "run", tmp_path / "not")


def test_skipping_is_bounded_and_then_goes_back(tmp_path: Path) -> None:
    spec = {"loss": "skip", "grad_norm": "off", "max_skips": 4, "rewind_steps": 20, "skip_batches": 30}
    train(table(tmp_path, steps=90, recovery=spec), Corrupted(range(60, 70)))
    done = [(e["action"], e["step"]) for e in told(tmp_path, "done")]
    assert done == [("skip", 61), ("skip", 62), ("skip", 63), ("skip", 64), ("rewind", 40)]


def test_a_nan_can_be_skipped(tmp_path: Path) -> None:
    config = table(tmp_path, steps=60, recovery={"non_finite": "skip"})
    model = PoisonedGPT(from_table(config).model_config(), calls=50)
    train(config, model=model)
    assert [(e["action"], e["step"]) for e in told(tmp_path, "done")] == [("skip", 50)]
    lines = [line for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines if line["loss"] is None] == [50]
    step = checkpoint.load(tmp_path / "checkpoints")[0]["optimizer/stack.final_norm.weight/step"]
    assert step == 59, "a skipped update does not count in Adam's bias correction"


def test_stop_stops(tmp_path: Path) -> None:
    with pytest.raises(SpikeError, match="step 53: the loss is"):
        train(table(tmp_path, recovery={"loss": "stop"}), Corrupted(range(50, 60)))
    assert checkpoint.steps(tmp_path / "checkpoints") == [20, 40]


def test_a_replayed_log_gives_the_same_bits(tmp_path: Path) -> None:
    """A spike that is gone back from and one update skipped, then only told to do so."""
    config = table(tmp_path / "run", steps=170, recovery={"rewind_steps": 40, "grad_norm": "skip"})
    train(config, Corrupted(range(130, 140)))
    actions = {e["action"] for e in told(tmp_path / "run", "done")}
    assert actions == {"rewind", "skip"}
    again = replayed(
        from_table({**config, "run_dir": str(tmp_path / "again")}), tmp_path / "run" / "events.jsonl"
    )
    loader = Corrupted(range(130, 140))
    train(again.to_dict(), loader)
    assert same_end(tmp_path / "run", tmp_path / "again")
    assert len(loader.served) == 170, "no update is undone"
    assert {e["action"] for e in told(tmp_path / "again", "done")} == {"change"}
    assert changes_of(tmp_path / "again" / "events.jsonl") == changes_of(tmp_path / "run" / "events.jsonl")


def test_a_run_stopped_anywhere_decides_the_same(tmp_path: Path) -> None:
    """Ended after the given number of updates, before, in and after a spike, and resumed: log and bits are equal."""
    spec = {"rewind_steps": 20, "skip_batches": 30}
    train(table(tmp_path / "straight", steps=100, recovery=spec), Corrupted(range(60, 70)))
    for stop in (59, 61, 62, 75):
        loader = Corrupted(range(60, 70))
        path = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            train(table(path, steps=100, recovery=spec), _Ending(loader, stop))
        train(table(path, steps=100, recovery=spec), loader)
        assert same_end(tmp_path / "straight", path)
        assert events.read(path / "events.jsonl") == events.read(tmp_path / "straight" / "events.jsonl")
        lines = [
            [(m["kind"], m["step"], m.get("loss")) for m in read(p / "metrics.jsonl")]
            for p in (path, tmp_path / "straight")
        ]
        assert lines[0] == lines[1]


class _Ending:
    """A loader whose process ends, without a checkpoint, when it has served ``count`` batches."""

    def __init__(self, loader: Corrupted, count: int) -> None:
        self.loader, self.left = loader, count

    def batch_at(self, step: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.loader.batch_at(step)


@pytest.mark.parametrize("place", ["discard", "go_back", "save"])
def test_a_kill_in_the_middle_of_going_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Ended when the given part of a rewind has been done for the first time."""
    from gptcore.train import metrics, recovery

    owner, name = {
        "discard": (checkpoint, "discard"),
        "go_back": (metrics.MetricsFile, "go_back"),
        "save": (recovery, "save"),
    }[place]
    spec = {"rewind_steps": 20, "skip_batches": 30}
    config = {"steps": 90, "recovery": spec, "checkpoint": {"every": 10, "keep_last": 3}}
    train(table(tmp_path / "straight", **config), Corrupted(range(60, 70)))
    real = getattr(owner, name)

    def ends(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, ends)
        train(table(tmp_path / "killed", **config), Corrupted(range(60, 70)))
    train(table(tmp_path / "killed", **config), Corrupted(range(60, 70)))
    assert same_end(tmp_path / "straight", tmp_path / "killed")
    logs = [events.read(tmp_path / name / "events.jsonl") for name in ("straight", "killed")]
    assert logs[0] == logs[1]


def test_a_corrupt_checkpoint_is_not_gone_back_to(tmp_path: Path, capsys: Any) -> None:
    class Breaks(Corrupted):
        def batch_at(self, step: int) -> Any:
            if step == 60:
                for file in _files(checkpoint.path_of(tmp_path / "checkpoints", 40)):
                    file.write_bytes(file.read_bytes()[:-9])
            return super().batch_at(step)

    spec = {"rewind_steps": 20, "skip_batches": 50}
    train(
        table(tmp_path, steps=80, checkpoint={"every": 10, "keep_last": 9}, recovery=spec),
        Breaks(range(60, 70)),
    )
    assert [e["step"] for e in told(tmp_path, "done")] == [30]
    assert "looking for another to go back to" in capsys.readouterr().err


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def test_checkpoints_reach_back_far_enough(tmp_path: Path) -> None:
    """One every 20, the last two kept, 100 updates to go back: at most two more stay, one always 100 old."""
    assert checkpoints_kept.anchor_spacing(from_table(table(tmp_path))) == 100
    assert checkpoints_kept.anchor_spacing(from_table(table(tmp_path, recovery={"rewind_steps": 90}))) == 100
    assert checkpoints_kept.anchor_spacing(from_table(table(tmp_path, checkpoint={"every": 100}))) == 0
    off = {"non_finite": "stop", "loss": "warn"}
    assert checkpoints_kept.anchor_spacing(from_table(table(tmp_path, recovery=off))) == 0
    config = from_table(table(tmp_path))
    for step in range(20, 1000, 20):
        spared = checkpoints_kept.spared(tmp_path, step, config)
        with checkpoint.Writer(tmp_path, keep_last=config.checkpoint.keep_last) as writer:
            writer.begin(step, {"x": torch.zeros(1)}, {}, spared=spared)
        there = checkpoint.steps(tmp_path)
        assert there[-2:] == [step - 20, step][-len(there) :] and len(there) <= 4
        assert step < 200 or any(step - 200 < kept <= step - 100 for kept in there)


def test_a_growing_batch_counts_what_was_skipped_as_gone_by(tmp_path: Path) -> None:
    """The data after a skip are the update's further on, its size that of there, and tokens count what was served."""
    ramp = {"batch": 4, "length": 8, "accumulate": 4, "ramp_tokens": 512, "ramp_from": 32}
    spread = {"data": ramp, "schedule": {"name": "constant"}, "changes": [{"step": 4, "skip_batches": 6}]}
    config = from_table(settings(tmp_path, steps=10, **spread))
    from gptcore.train import run

    run(config, model=Toy(), loader=ToyLoader(), measure_peak=False, quiet=True)
    lines = [line for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    sizes = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise([{"tokens": 0}, *lines])]
    updates = [*range(4), *range(10, 16)]
    assert sizes == [32 * len(config.micro_batches(update)) for update in updates]


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    for spec, sentence in (
        ({"least": 200}, "recovery.least: 200 is more than recovery.window 128"),
        ({"patience": 0}, "recovery.patience: expected 1 or more, got 0"),
        ({"loss": "rewinds"}, "unknown recovery.loss 'rewinds'; did you mean 'rewind'"),
    ):
        with pytest.raises(UserError, match=sentence):
            from_table(table(tmp_path, recovery=spec))
    with pytest.raises(UserError, match="recovery.loss: rewind needs checkpoints to go back to"):
        from_table(table(tmp_path, checkpoint={"every": 0}))
