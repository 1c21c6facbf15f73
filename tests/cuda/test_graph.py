"""Updates from recordings: the same numbers as without, on the processor's stand-in for CUDA graphs and on a GPU."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gptcore import backend, checkpoint
from gptcore.errors import UserError
from gptcore.models import GPT, GPTConfig
from gptcore.train import from_table, graph, graphed, strategies
from gptcore.train import run as train
from gptcore.train.device_batches import DeviceBatch, DeviceBatches, PinnedSender, Place, PlainSender
from gptcore.train.guard import Guard
from gptcore.train.leaves import batch_of, seed
from gptcore.train.metrics import read
from gptcore.train.step import forward, objective, update
from tests.cuda.host_recorder import HostRecorder
from tests.train.toy import TINY_GPT, Batch, Toy, ToyLoader, settings

CPU = torch.device("cpu")


def config_of(tmp_path: Any, **changes: Any) -> Any:
    return from_table(settings(tmp_path, parallel={"fixed_tree": False}, **changes))


def graphs_of(
    config: Any, model: torch.nn.Module, optimizer: Any, recorder: Any, device: torch.device = CPU
) -> graph.StepGraphs:
    return graph.StepGraphs(
        model, optimizer, recorder, forward=lambda batch: forward(config, model, batch, {}),
        total=lambda out, weight: objective(out, config, weight), seed=functools.partial(seed, config), device=device,
    )  # fmt: skip


def both_ways(
    config: Any,
    make: Callable[[], torch.nn.Module],
    recorder_of: Callable[[Any], Any],
    device: torch.device = CPU,
) -> tuple[list[Any], Any]:
    """Losses, norms and weights of 7 updates with and without recordings, and the recorder."""
    results = []
    for recorded in (False, True):
        torch.manual_seed(config.seed)
        model = make().to(device)
        called, optimizer = strategies.prepare(config, model)
        recorder = recorder_of(optimizer)
        graphs = graphs_of(config, model, optimizer, recorder, device)
        fetch, numbers = functools.partial(batch_of, ToyLoader(), config), []
        with DeviceBatches(fetch, PlainSender(device)) as batches:
            for step in range(7):
                if recorded:
                    leaves = [batches.take((step, leaf)) for leaf in range(config.data.accumulate)]
                    told = graphs.launch(step, config.learning_rate(step), leaves).read()
                    numbers.append((told.loss, told.grad_norm))
                else:
                    loss = update(config, called, optimizer, ToyLoader(), step, batches=batches)
                    numbers.append((loss, float(optimizer.last_grad_norm)))
        results.append((numbers, [p.detach().clone() for p in model.parameters()]))
    return results, recorder


def assert_same(results: list[Any]) -> None:
    (numbers, weights), (recorded_numbers, recorded_weights) = results
    assert recorded_numbers == numbers
    assert all(torch.equal(a, b) for a, b in zip(weights, recorded_weights, strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recordings_have_the_same_bits(tmp_path: Any, dtype: torch.dtype, accumulate: int) -> None:
    config = config_of(tmp_path, data={"accumulate": accumulate}, z_loss=1e-3)
    results, recorder = both_ways(config, lambda: Toy().to(dtype), HostRecorder)
    assert_same(results)
    recordings = 3 if accumulate > 1 else 2
    assert recorder.recorded == recordings
    assert recorder.replayed == (7 - graph.WARM_UPS) * (accumulate + 1)


def test_what_cannot_be_captured_goes_on_without(tmp_path: Any) -> None:
    backend.reset_report()
    refuse = functools.partial(HostRecorder, refuses="operation not permitted when stream is capturing")
    results, recorder = both_ways(config_of(tmp_path), Toy, refuse)
    assert_same(results)
    assert recorder.recorded == 0
    assert backend.report() == {"train.graph": {"operation not permitted when stream is capturing": 1}}


def leaf(length: int = 8, **options: torch.Tensor) -> DeviceBatch:
    tokens = torch.arange(4 * length).view(4, length) % 32
    return DeviceBatch(tokens, tokens.roll(1, 1), options, 1.0)


def test_a_recording_for_each_shape_and_not_without_end(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "MOST_SHAPES", 2)
    backend.reset_report()
    config, model = config_of(tmp_path), Toy()
    _, optimizer = strategies.prepare(config, model)
    graphs = graphs_of(config, model, optimizer, recorder := HostRecorder(optimizer))
    for step in range(4):
        for length in (8, 5, 6):
            graphs.launch(step, 0.01, [leaf(length)]).read()
    assert recorder.recorded == 2 * 2
    assert backend.report() == {"train.graph": {"more than 2 shapes": 4}}
    graphs.launch(5, 0.01, [leaf(8), leaf(5)]).read()
    assert backend.report()["train.graph"]["leaves of several shapes, or padding"] == 1


class Packed(ToyLoader):
    """Rows cut into documents, another number of them each time."""

    def batch_at(self, step: int) -> Batch:
        batch = super().batch_at(step)
        more = np.random.default_rng(step).integers(1, 32, step % 5)
        return batch._replace(cu_seqlens=np.unique([0, 8, 16, 24, 32, *more]).astype(np.int32))


def test_packed_documents_make_few_shapes(tmp_path: Any) -> None:
    backend.reset_report()
    config, results = config_of(tmp_path), []
    for recorded in (False, True):
        model = GPT(GPTConfig.from_dict(TINY_GPT), seed=1)
        _, optimizer = strategies.prepare(config, model)
        recorder = HostRecorder(optimizer)
        graphs = graphs_of(config, model, optimizer, recorder)
        fetch, losses = functools.partial(batch_of, Packed(), config), []
        with DeviceBatches(fetch, PlainSender(CPU)) as batches:
            for step in range(20):
                if recorded:
                    launched = graphs.launch(step, config.learning_rate(step), [batches.take((step, 0))])
                    losses.append(launched.read().loss)
                else:
                    losses.append(update(config, model, optimizer, Packed(), step, batches=batches))
        results.append(losses)
    assert results[0] == results[1]
    assert recorder.recorded == 2 * 2  # of 4 documents, and of 5 to 8
    assert recorder.replayed > 20 and backend.report() == {}


def test_padding_and_weights_tell_shapes_apart() -> None:
    assert graph._shape_of([leaf(mask=torch.ones(4, 8, dtype=torch.bool))]) is None
    weighted = leaf()._replace(weight=0.5)
    assert graph._shape_of([leaf()]) != graph._shape_of([weighted])
    assert graph._shape_of([leaf(), weighted]) is None
    assert graph._shape_of([leaf(), leaf()]) != graph._shape_of([leaf()])


def test_a_gradient_that_is_not_finite_is_told(tmp_path: Any) -> None:
    config, model = config_of(tmp_path), Toy(dropout=0.0)
    _, optimizer = strategies.prepare(config, model)
    graphs = graphs_of(config, model, optimizer, HostRecorder(optimizer))
    for step in range(4):
        graphs.launch(step, 0.01, [leaf()]).read()
    before = [p.detach().clone() for p in model.parameters()]
    graphs._total = lambda out, weight: out.loss * torch.inf
    told = graphs.launch(4, 0.01, [leaf()]).read()
    assert told.found_inf and np.isfinite(told.loss)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# --- runs ---------------------------------------------------------------------------------------------------


def recorded_run(monkeypatch: pytest.MonkeyPatch, recorders: list[HostRecorder]) -> None:
    """Lets a run on the processor take the way of one on a GPU."""

    def recorder_for(now: Any) -> HostRecorder:
        recorders.append(HostRecorder(now.optimizer))
        return recorders[-1]

    monkeypatch.setattr(graphed, "_recorder_of", recorder_for)
    monkeypatch.setattr(graphed, "_is_asynchronous", lambda device: True)


@pytest.mark.parametrize("ramp", [0, 300])
def test_a_run_by_recordings_writes_the_same_lines(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, ramp: int
) -> None:
    lines, recorders = [], []
    for name in ("plain", "recorded"):
        if name == "recorded":
            recorded_run(monkeypatch, recorders)
        table = settings(
            tmp_path / name, steps=20, parallel={"fixed_tree": False},
            data={"accumulate": 3, "ramp_tokens": ramp, "ramp_from": 32},
        )  # fmt: skip
        train(from_table(table), model=Toy(), loader=ToyLoader(), measure_peak=False, quiet=True)
        kept = ("kind", "step", "loss", "lr", "tokens")
        metrics = read(tmp_path / name / "metrics.jsonl")
        lines.append([{k: v for k, v in line.items() if k in kept} for line in metrics])
    assert lines[0] == lines[1] and len(lines[0]) >= 20
    assert all(line["device_share"] > 0 for line in metrics if line["kind"] == "train")
    assert recorders[0].replayed > 0


def test_a_resumed_run_equals_one_that_was_not_stopped(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded_run(monkeypatch, [])
    weights = []
    for name, stops in (("whole", [20]), ("parts", [10, 20])):
        for steps in stops:
            model = Toy()
            table = settings(tmp_path / name, steps=steps, schedule={"name": "constant"})
            train(from_table(table), model=model, loader=ToyLoader(), measure_peak=False, quiet=True)
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class Spiking(ToyLoader):
    """Three batches of which nothing can be learnt."""

    def batch_at(self, step: int) -> Batch:
        batch = super().batch_at(step)
        if step not in range(62, 65):
            return batch
        return batch._replace(targets=np.full_like(batch.targets, 31))


def test_going_back_is_as_without(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though another update was begun when the spike is seen."""
    lines, recorders = [], []
    recovery = {
        "grad_norm": "rewind",
        "rewind_steps": 3,
        "skip_batches": 8,
        "patience": 2,
        "threshold": 5.0,
        "least": 20,
    }
    for name in ("plain", "recorded"):
        if name == "recorded":
            recorded_run(monkeypatch, recorders)
        table = settings(tmp_path / name, steps=90, recovery=recovery, evaluation={"every": 0})
        train(from_table(table), model=Toy(), loader=Spiking(), measure_peak=False, quiet=True)
        metrics = read(tmp_path / name / "metrics.jsonl")
        lines.append(
            [{k: v for k, v in line.items() if "_s" not in k and k != "seconds"} for line in metrics]
        )
    assert lines[0] == lines[1]
    assert [line["text"] for line in lines[0] if line["kind"] == "warning"]
    assert recorders[0].recorded == 4  # again once the optimizer's state is another one


def test_a_change_under_way_is_recorded_anew(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, recorders = [], []
    changes = [{"step": 12, "max_norm": 0.1}, {"step": 20, "lr_factor": 0.5}]
    for name in ("plain", "recorded"):
        if name == "recorded":
            recorded_run(monkeypatch, recorders)
        table = settings(tmp_path / name, steps=30, changes=changes)
        train(from_table(table), model=Toy(), loader=ToyLoader(), measure_peak=False, quiet=True)
        metrics = read(tmp_path / name / "metrics.jsonl")
        lines.append([(line["step"], line.get("loss"), line.get("grad_norm")) for line in metrics])
    assert lines[0] == lines[1] and recorders[0].recorded == 6


def test_the_device_is_given_the_next_update_before_numbers_are_waited_for(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    launch, read_numbers = graph.StepGraphs.launch, graph.Launched.read

    def noted_launch(self: Any, step: int, *rest: Any) -> Any:
        happened.append(f"launch {step}")
        return launch(self, step, *rest)

    def noted_read(self: Any) -> Any:
        happened.append("read")
        return read_numbers(self)

    monkeypatch.setattr(graph.StepGraphs, "launch", noted_launch)
    monkeypatch.setattr(graph.Launched, "read", noted_read)
    recorded_run(monkeypatch, [])
    table = settings(tmp_path, steps=7, evaluation={"every": 5}, checkpoint={"every": 3})
    train(from_table(table), model=Toy(), loader=ToyLoader(), measure_peak=False, quiet=True)
    assert happened == [  # looked at after 3, 5, 6 and 7 updates
        "launch 0", "launch 1", "read", "launch 2", "read", "read", "launch 3", "launch 4", "read", "read",
        "launch 5", "read", "launch 6", "read",
    ]  # fmt: skip


def test_a_run_that_is_asked_to_stop_saves_what_it_says(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(ToyLoader):
        def batch_at(self, step: int) -> Batch:
            if step == 13:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch_at(step)

    recorded_run(monkeypatch, [])
    schedule = {"name": "constant"}
    table = settings(
        tmp_path / "stopped", checkpoint={"every": 0}, evaluation={"every": 0}, schedule=schedule
    )
    with pytest.raises(SystemExit):
        train(from_table(table), model=Toy(), loader=Stopping(), measure_peak=False, quiet=True)
    (step,) = checkpoint.steps(tmp_path / "stopped" / "checkpoints")
    saved = checkpoint.Checkpoint(checkpoint.path_of(tmp_path / "stopped" / "checkpoints", step))
    whole = Toy()
    table = settings(tmp_path / "whole", steps=step, schedule=schedule)
    train(from_table(table), model=whole, loader=ToyLoader(), measure_peak=False, quiet=True)
    assert 10 <= step <= 15 and torch.equal(saved.read("model/up"), whole.up)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_run(monkeypatch, [])

    class Broken(ToyLoader):
        def batch_at(self, step: int) -> Batch:
            if step == 12:
                with torch.no_grad():
                    model.bias.fill_(torch.nan)
            return super().batch_at(step)

    model = Toy()
    config = from_table(settings(tmp_path, recovery={"non_finite": "stop"}))
    with pytest.raises(UserError, match=r"the loss is nan at step 1[123] .*the checkpoint of step 10"):
        train(config, model=model, loader=Broken(), measure_peak=False, quiet=True)


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_table(settings(tmp_path, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "why_no_kernels", lambda device: None)
    with pytest.raises(
        UserError, match=r"device: got 'cuda', but torch sees no CUDA device; see gptcore info"
    ):
        train(config, model=Toy(), loader=ToyLoader())
    monkeypatch.setattr(
        backend, "why_no_kernels", lambda device: "device cuda: gptcore was built without CUDA"
    )
    with pytest.raises(UserError, match="built without CUDA"):
        train(config, model=Toy(), loader=ToyLoader())


def test_obstacles_are_named(tmp_path: Any) -> None:
    def why(model: Any = None, routing: Any = None, scaler: Any = None, **changes: Any) -> str | None:
        config = from_table(settings(tmp_path, **changes))
        model = Toy() if model is None else model
        called, optimizer = strategies.prepare(config, model)
        return graphed.obstacle(config, called, optimizer, Guard(config.recovery), routing, scaler)

    assert why() is None
    assert why(graphs=False) == "graphs are off"
    assert "fixed tree" in str(why(data={"accumulate": 2}))
    assert why(data={"accumulate": 2}, parallel={"fixed_tree": False}) is None
    assert "skip" in str(why(recovery={"loss": "skip"}))
    assert "loss scale" in str(why(scaler=object()))
    assert "experts" in str(why(routing=object()))
    checkpointed = {"memory": {"activation_checkpointing": "block"}}
    assert why(Toy(dropout=0.0), **checkpointed) is None
    assert "random" in str(why(**checkpointed))


# --- batches ------------------------------------------------------------------------------------------------


class Told(PlainSender):
    """Says in which order batches were sent."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.sent: list[int] = []

    def send(self, tensors: Any) -> Any:
        self.sent.append(int(tensors["tokens"][0, 0]))
        return super().send(tensors)


def numbered(update: int, leaf: int) -> Batch:
    if update > 9:
        raise UserError("the data ends")
    tokens = np.full((1, 2), 10 * update + leaf)
    return Batch(tokens, tokens)


def test_batches_come_ahead_and_in_order() -> None:
    sender = Told()
    with DeviceBatches(numbered, sender) as batches:
        for update in range(3):
            for leaf_number in range(2):
                following = [(update, 1)] * (leaf_number == 0) + [(update + 1, 0), (update + 1, 1)]
                batch = batches.take((update, leaf_number), following)
                assert batch.tokens.tolist() == [[10 * update + leaf_number] * 2]
    assert sender.sent[:6] == [0, 1, 10, 11, 20, 21]  # each once


def test_an_unexpected_batch_is_made_on_the_spot() -> None:
    with DeviceBatches(numbered, Told(), depth=1) as batches:
        batches.take((0, 0), [(1, 0), (2, 0)])
        assert batches.take((7, 1), [(8, 0)]).tokens[0, 0] == 71
        assert list(batches._staged) == [(8, 0)]


def test_an_error_is_raised_for_the_batch_that_has_it() -> None:
    with DeviceBatches(numbered, Told()) as batches:
        assert batches.take((9, 0), [(10, 0)]).tokens[0, 0] == 90
        with pytest.raises(UserError, match="the data ends"):
            batches.take((10, 0))


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if why := backend.why_no_kernels("cuda", "adamw", "layer_norm", "attention"):
        pytest.skip(why)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.cuda
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_graphs_have_the_same_bits(
    tmp_path: Any, gpu: torch.device, dtype: torch.dtype, accumulate: int, dropout: float
) -> None:
    model = GPTConfig.from_dict(
        {**TINY_GPT, "dropout": dropout, "attention": {"num_heads": 2, "dropout": dropout}}
    )
    config = config_of(tmp_path, data={"accumulate": accumulate}, device="cuda")
    backend.reset_report()
    results, _ = both_ways(config, lambda: GPT(model, dtype=dtype), lambda _: graph.CudaRecorder(gpu), gpu)
    assert "train.graph" not in backend.report()
    assert_same(results)


@pytest.mark.cuda
def test_pinned_batches_arrive_whole(gpu: torch.device) -> None:
    places: list[Place] = [(update, leaf) for update in range(9) for leaf in range(2)]
    with DeviceBatches(numbered, PinnedSender(gpu)) as batches:
        for i, place in enumerate(places):
            torch.cuda._sleep(1_000_000)
            batch = batches.take(place, places[i + 1 : i + 3])
            assert batch.tokens.device == gpu
            assert int(batch.tokens.sum()) == 2 * (10 * place[0] + place[1])
