"""The loop: it learns, measures, stops cleanly, and changes nothing when anything goes wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.optim import AdamW, decay_groups
from gptcore.train import NonFiniteError, from_table, held_out, optimizers, update
from gptcore.train.metrics import read

from .toy import Batch, Toy, ToyLoader, settings, train


def digest(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(directory / "checkpoints")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_and_leaves_everything_behind(tmp_path: Path, dtype: str) -> None:
    said: list[str] = []

    def sample(model: torch.nn.Module) -> str:
        said.append("x")
        return f"sample {len(said)}"

    model, result = train(settings(tmp_path, dtype=dtype, sample={"every": 20}), sample=sample)
    assert result.step == 40 and result.checkpoint.exists() and result.curve == tmp_path / "loss.png"
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.table.dtype == torch.float32, "buffers keep their dtype"
    lines = read(tmp_path / "metrics.jsonl")
    held = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in held] == [0, 10, 20, 30, 40]
    assert held[-1]["val_loss"] < held[0]["val_loss"] - 0.5, "40 updates must learn to count"
    assert held[-1]["val_bits_per_byte"] == pytest.approx(held[-1]["val_loss"] / math.log(2) / 2)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 41))
    assert [line["text"] for line in lines if line["kind"] == "sample"] == ["sample 1", "sample 2"]
    assert checkpoint.steps(tmp_path / "checkpoints") == [35, 40]
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 40


def test_one_update_is_adamw_on_the_mean_gradient(tmp_path: Path) -> None:
    """Two micro-batches against torch's optimizer, schedule and clip, in float64."""
    config = from_table(settings(tmp_path, data={"accumulate": 2}, optimizer={"max_norm": 0.1}))
    model = Toy(dropout=0.0)
    twin = Toy(dropout=0.0).double()
    optimizer = optimizers.build(config.optimizer, model)
    oracle = torch.optim.AdamW(decay_groups(twin, 0.1), lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    loader = ToyLoader()
    for step in range(3):
        loss = update(config, model, optimizer, loader, step)
        oracle.zero_grad()
        for group in oracle.param_groups:
            group["lr"] = config.learning_rate(step)
        losses = []
        for micro in (2 * step, 2 * step + 1):
            batch = loader.batch_at(micro)
            out = twin(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets))
            (out.loss / 2).backward()
            losses.append(float(out.loss.detach()))
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        oracle.step()
        assert optimizer.last_grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    # Updates of about lr = 0.005; where |g| is near eps, Adam's quotient magnifies the f32 error of g.
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=2e-5, msg=name)


def test_bf16_micro_batches_are_summed_in_f32(tmp_path: Path) -> None:
    """The norm of the f32 sum of bf16 gradients to 1e-6; a sum in bf16 is off by some 1e-3."""
    config = from_table(settings(tmp_path, data={"accumulate": 3}))
    model, twin = Toy(dropout=0.0).bfloat16(), Toy(dropout=0.0).bfloat16()
    optimizer = AdamW(decay_groups(model, 0.1))
    update(config, model, optimizer, ToyLoader(), 0)
    sums = [torch.zeros(p.shape, dtype=torch.float64) for p in twin.parameters()]
    for micro in range(3):
        batch = ToyLoader().batch_at(micro)
        twin.zero_grad()
        twin(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)).loss.backward()
        for total, p in zip(sums, twin.parameters(), strict=True):
            assert p.grad is not None
            total += p.grad.double() / 3
    norm = math.sqrt(sum(float(total.square().sum()) for total in sums))
    assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)


def test_z_loss_is_trained_but_not_reported(tmp_path: Path) -> None:
    plain, _ = train(settings(tmp_path / "a", steps=1))
    with_z, _ = train(settings(tmp_path / "b", steps=1, z_loss=1.0))
    a, b = (read(tmp_path / name / "metrics.jsonl")[1] for name in "ab")
    assert a["loss"] == b["loss"] and a["grad_norm"] != b["grad_norm"]
    assert not torch.equal(plain.up, with_z.up)


def test_cu_seqlens_reach_the_model(tmp_path: Path) -> None:
    bounds = np.array([0, 3, 8], dtype=np.int64)

    class Packed(ToyLoader):
        def batch_at(self, step: int) -> Batch:
            return super().batch_at(step)._replace(cu_seqlens=bounds)

    class Checks(Toy):
        def forward(self, tokens: Any, targets: Any, *, cu_seqlens: Any = None, z_loss: float = 0.0) -> Any:
            assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 8]
            return super().forward(tokens, targets, z_loss=z_loss)

    model = Checks()
    config = from_table(settings(tmp_path))
    assert math.isfinite(update(config, model, AdamW(decay_groups(model, 0.1)), Packed(), 0))
    assert math.isfinite(held_out(Packed(), 2)(model)["val_loss"])


def test_held_out_loss_weighs_tokens_and_skips_ignored_ones() -> None:
    """Batches of 1 and 3 counted tokens, losses 4 and 0: the mean is 1."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
            loss = 4.0 if int((targets >= 0).sum()) == 1 else 0.0
            return type("Out", (), {"loss": torch.tensor(loss)})

    class Loader:
        def batch_at(self, step: int) -> Batch:
            targets = np.array([[1, 1, 1, -100]] if step else [[1, -100, -100, -100]])
            return Batch(np.zeros((1, 4), np.int64), targets, target_bytes=5 if step else 3)

    result = held_out(Loader(), 2)(Model())
    assert result == {"val_loss": 1.0, "val_bits_per_byte": pytest.approx(4 / math.log(2) / 8)}


def test_evaluation_and_samples_do_not_change_the_run(tmp_path: Path) -> None:
    """An evaluation that draws random numbers leaves weights and generators as they would be without."""

    def noisy(model: torch.nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {"val_loss": float(torch.rand(()))}

    train(settings(tmp_path / "a"), evaluate=None)
    train(settings(tmp_path / "b", evaluation={"every": 3}), evaluate=noisy)
    assert same(digest(tmp_path / "a"), digest(tmp_path / "b"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [2, 4])
def test_same_bits_for_every_thread_count(tmp_path: Path, threads: int, dtype: str) -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            table = settings(tmp_path / str(count), threads=count, dtype=dtype, data={"accumulate": 2})
            train({**table, "steps": 10})
    finally:
        torch.set_num_threads(before)
    assert same(digest(tmp_path / "1"), digest(tmp_path / str(threads)))


class Poisoned(ToyLoader):
    """Makes the model see NaN at one step, by a weight that the test has set."""

    def __init__(self, model: torch.nn.Module, step: int, value: float) -> None:
        super().__init__()
        self.model, self.step, self.value = model, step, value

    def batch_at(self, step: int) -> Batch:
        if step == self.step:
            with torch.no_grad():
                self.model.get_buffer("table")[3] = self.value
        return super().batch_at(step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_with_the_checkpoint_intact(tmp_path: Path, value: float) -> None:
    from gptcore.train import run

    model = Toy()
    config = from_table(settings(tmp_path, recovery={"non_finite": "stop"}))
    with pytest.raises(
        NonFiniteError, match=r"loss is nan at step 13 .*optimizer.lr.*checkpoint of step 10 "
    ):
        run(config, model=model, loader=Poisoned(model, 12, value), measure_peak=False, quiet=True)
    assert all(bool(p.isfinite().all()) for p in model.parameters()), "the bad gradient reached no weight"
    assert checkpoint.steps(tmp_path / "checkpoints") == [5, 10]
    train(settings(tmp_path))
    train(settings(tmp_path.with_name("straight")))
    assert same(digest(tmp_path), digest(tmp_path.with_name("straight"))), "a healthy resume is exact"


def test_a_non_finite_gradient_of_a_finite_loss_stops_too(tmp_path: Path) -> None:
    """sqrt at 0 has a finite value and an infinite slope."""
    from gptcore.train import run

    class Steep(Toy):
        def forward(self, tokens: Any, targets: Any, *, z_loss: float = 0.0) -> Any:
            out = super().forward(tokens, targets, z_loss=z_loss)
            return out._replace(loss=out.loss + (self.bias[0] * 0).sqrt())

    model = Steep()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match=r"a gradient is not finite at step 1 .*no checkpoint yet"):
        run(from_table(settings(tmp_path)), model=model, loader=ToyLoader(), quiet=True, measure_peak=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    train(settings(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    _, result = train(settings(tmp_path))
    assert result.step == 40 and (tmp_path / "metrics.jsonl").read_bytes() == lines


def test_longer_runs_continue_and_say_what_changed(tmp_path: Path, capsys: Any) -> None:
    train(settings(tmp_path))
    train(settings(tmp_path, steps=45), quiet=False)
    assert "resuming" in (said := capsys.readouterr().err) and "steps 40 -> 45" in said
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 45
    with pytest.raises(UserError, match="beyond steps = 40"):
        train(settings(tmp_path))


def test_no_resume_refuses_what_is_there(tmp_path: Path) -> None:
    train(settings(tmp_path, steps=5))
    with pytest.raises(UserError, match="holds a run at step 5; resume it, or choose another run_dir"):
        train(settings(tmp_path), resume=False)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    one, two = (type("Tokenizer", (), {"fingerprint": name}) for name in ("aaa", "bbb"))
    train(settings(tmp_path, steps=5), tokenizer=one)
    before = os.listdir(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="trained with tokenizer aaa, this run has bbb"):
        train(settings(tmp_path), tokenizer=two)
    assert os.listdir(tmp_path / "checkpoints") == before


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    from gptcore.train import run

    loader = ToyLoader()
    loader.fingerprint = "aaa"  # type: ignore[attr-defined]
    tokenizer = type("Tokenizer", (), {"fingerprint": "bbb"})
    with pytest.raises(UserError, match="the data was prepared with tokenizer aaa, this run has bbb"):
        run(
            from_table(settings(tmp_path)),
            model=Toy(),
            loader=loader,
            tokenizer=tokenizer,
            measure_peak=False,
        )


def test_another_data_order_is_said(tmp_path: Path, capsys: Any) -> None:
    from gptcore.train import run

    class Stateful(ToyLoader):
        def state(self) -> dict[str, Any]:
            return {"step": 9, "seed": self.seed}

    for steps, seed in ((5, 1), (10, 2)):
        config = from_table(settings(tmp_path, steps=steps))
        run(config, model=Toy(), loader=Stateful(seed=seed), measure_peak=False)
    assert "loader.seed 1 -> 2" in capsys.readouterr().err


def test_another_model_is_refused(tmp_path: Path) -> None:
    from gptcore.train import run

    train(settings(tmp_path, steps=5))
    with pytest.raises(
        UserError, match=r"another model: 'embedding' is .* \(32, 16\), the model has .* \(32, 8\)"
    ):
        run(
            from_table(settings(tmp_path)),
            model=Toy(width=8),
            loader=ToyLoader(),
            quiet=True,
            measure_peak=False,
        )


def test_a_corrupt_newest_checkpoint_costs_only_the_steps_since(tmp_path: Path, capsys: Any) -> None:
    train(settings(tmp_path, steps=20))
    newest = checkpoint.path_of(tmp_path / "checkpoints", 20) / "shard-00000-of-00001.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    train(settings(tmp_path))
    assert "falling back to step 15" in capsys.readouterr().err
    train(settings(tmp_path.with_name("straight")))
    # The shorter run had another schedule up to step 20, so only completeness is compared here.
    steps = [line["step"] for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 41))


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    from gptcore.train.run_directory import RunDirectory

    with RunDirectory(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        train(settings(tmp_path))
    train(settings(tmp_path, steps=1))


def test_an_unusable_run_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use run directory"):
        train(settings(tmp_path / "file" / "run"))


def test_split_masters_resume_from_either_kind(tmp_path: Path) -> None:
    """bf16: whole masters straight through; the first half whole and the second split, and the other way round."""
    table = {"steps": 20, "seed": 3, "dtype": "bfloat16", "schedule": {"name": "constant"}}
    train(settings(tmp_path / "straight", **table))
    want = checkpoint.load(tmp_path / "straight" / "checkpoints")[0]
    for name, first, second in (("late", False, True), ("early", True, False)):
        path = tmp_path / name
        train(settings(path, **{**table, "steps": 10}, optimizer={"split_master": first}))
        train(settings(path, **table, optimizer={"split_master": second}))
        got = checkpoint.load(path / "checkpoints")[0]
        assert got.keys() == want.keys()
        # Ties of the rounding, one in 2^17, would show as another weight; this run has none.
        assert [key for key in want if not torch.equal(got[key], want[key])] == []


def test_a_growing_batch_resumes_in_the_middle(tmp_path: Path) -> None:
    """From one micro-batch of 32 tokens to four over 512 tokens; a stop after 7 updates changes nothing."""
    table = {
        "steps": 20,
        "data": {"accumulate": 4, "ramp_tokens": 512, "ramp_from": 32},
        "schedule": {"name": "constant"},
    }
    train(settings(tmp_path / "straight", **table))
    train(settings(tmp_path / "parts", **{**table, "steps": 7}))
    train(settings(tmp_path / "parts", **table))
    straight, parts = (
        [(m["step"], m["tokens"], m["loss"], m["grad_norm"]) for m in read(path) if m["kind"] == "train"]
        for path in (tmp_path / name / "metrics.jsonl" for name in ("straight", "parts"))
    )
    assert straight == parts
    sizes = [b[1] - a[1] for a, b in itertools.pairwise([(0, 0), *straight])]
    assert sizes[0] == 32 and sizes[-1] == 128 and sizes == sorted(sizes)
    assert sum(sizes[: sizes.index(128)]) < 512 + 128
