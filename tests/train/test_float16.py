"""float16: gradients near f32's, an overflow that costs one update, a collapse that is told, the same bits resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.errors import UserError
from gptcore.models import GPT
from gptcore.train import NonFiniteError, from_table, held_out, run
from gptcore.train.metrics import read
from tests.models.cases import CASES, model_of, tokens_of

from .toy import TINY_GPT, Batch, ToyLoader, settings

OVERFLOW = 12


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma", "encoder", "experts", "bloom", "gptj"])
def test_gradients_are_near_those_of_f32(name: str) -> None:
    """Of the same weights, under a loss scale of 1,024.

    A value is rounded to f16 some 10 times in each of 3 layers and as often in backward, by up to 2^-11 = 4.9e-4 each:
    sqrt(60) of them are 3.8e-3, and the softmaxes of these large weights magnify; bf16, rounding 8 times as coarsely,
    would be above.
    """
    half = model_of(CASES[name], torch.float16)
    single = GPT(half.config)
    single.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    tokens, targets = tokens_of(half.config)
    losses = []
    for model, scale in ((half, 1024.0), (single, 1.0)):
        out = model(tokens, targets)
        (out.total * scale).backward()
        losses.append(float(out.loss.detach()))
        assert out.loss.dtype == torch.float32
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    got = torch.cat([p.grad.float().flatten() / 1024 for p in half.parameters()])
    want = torch.cat([p.grad.flatten() for p in single.parameters()])
    assert all(p.grad.dtype == torch.float16 for p in half.parameters())
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 1.5e-2, error


class Injecting(ToyLoader):
    """Makes one gradient infinite in the updates whose batches are in ``steps``."""

    def __init__(self, model: GPT, steps: range) -> None:
        super().__init__()
        self.steps, self.now = steps, -1
        model.stack.blocks[0].mlp.up.weight.register_hook(self._spoil)

    def batch_at(self, step: int) -> Batch:
        self.now = step
        return super().batch_at(step)

    def _spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if self.now in self.steps else gradient


def trained(path: Path, overflows: range, **changes: Any) -> tuple[GPT, Any]:
    table = settings(path, **{
        "model": {**TINY_GPT, "dropout": 0.1}, "dtype": "float16",
        "loss_scale": {"init_scale": 1024.0, "growth_interval": 9},
        "schedule": {"name": "constant"}, "evaluation": {"every": 0}, **changes,
    })  # fmt: skip
    config = from_table(table)
    model = GPT(config.model_config(), seed=config.seed)
    loader = Injecting(model, overflows)
    options: dict[str, Any] = {"measure_peak": False, "quiet": True}
    return model, run(config, model=model, loader=loader, **options)


def losses_of(path: Path) -> dict[int, Any]:
    return {line["step"]: line for line in read(path / "metrics.jsonl") if line["kind"] == "train"}


def test_an_injected_overflow_costs_one_update(tmp_path: Path) -> None:
    """Skipped, scale halved, grown again, the end near f32's; and resumed across it, bit for bit."""
    half, _ = trained(tmp_path / "half", range(OVERFLOW, OVERFLOW + 1))
    single, _ = trained(tmp_path / "single", range(0), dtype="float32")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    lines = losses_of(tmp_path / "half")
    scales = {step: line["loss_scale"] for step, line in lines.items()}
    # Doubled by the 9th update, halved by the 13th, whose index is 12, doubled by the 22nd, 31st and 40th.
    start = 1024.0
    assert [scales[s] for s in (8, 9, 12)] == [start, 2 * start, 2 * start]
    assert [scales[s] for s in (13, 21, 22, 31, 40)] == [start, start, 2 * start, 4 * start, 8 * start]
    assert lines[OVERFLOW]["skipped_updates"] == 0 and lines[OVERFLOW + 1]["skipped_updates"] == 1
    assert lines[40]["skipped_updates"] == 1
    evaluate = held_out(ToyLoader(seed=1), 10)
    ends = [evaluate(model.eval())["val_loss"] for model in (half, single)]
    assert ends[1] < 2.6, "ln 32 = 3.47 is guessing"
    assert ends[0] == pytest.approx(ends[1], abs=0.05)

    for stop in (OVERFLOW, OVERFLOW + 1, OVERFLOW + 5):
        parts = tmp_path / str(stop)
        trained(parts, range(OVERFLOW, OVERFLOW + 1), steps=stop)
        trained(parts, range(OVERFLOW, OVERFLOW + 1))
        want, got = (checkpoint.load(path / "checkpoints") for path in (tmp_path / "half", parts))
        assert got[1]["loss_scale"] == want[1]["loss_scale"]
        assert [name for name in want[0] if not torch.equal(got[0][name], want[0][name])] == []
        assert want[0].keys() == got[0].keys()
        resumed = losses_of(parts)
        assert [m["loss"] for m in resumed.values()] == [m["loss"] for m in lines.values()]


def test_an_overflow_touches_no_weight(tmp_path: Path) -> None:
    before, _ = trained(tmp_path / "before", range(OVERFLOW, OVERFLOW + 1), steps=OVERFLOW)
    after, _ = trained(tmp_path / "after", range(OVERFLOW, OVERFLOW + 1), steps=OVERFLOW + 1)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_a_collapse_stops_the_run(tmp_path: Path) -> None:
    """Where the run is not to go back, as it does unless told."""
    stop = {"non_finite": "stop"}
    with pytest.raises(
        NonFiniteError, match=r"overflowed in 3 updates one after the other at step 15 .*step 10"
    ):
        trained(tmp_path / "patience", range(OVERFLOW, 40), loss_scale={"patience": 3}, recovery=stop)
    least = {"init_scale": 4.0, "minimum": 2.0, "growth_interval": 100}
    with pytest.raises(NonFiniteError, match="gradients overflow at the least loss scale, 2 at step 14"):
        trained(tmp_path / "least", range(OVERFLOW, 40), loss_scale=least, recovery=stop)


def test_micro_batches_and_checkpointed_activations(tmp_path: Path) -> None:
    """The scale and the number of micro-batches are divided out together; recomputing keeps the bits."""
    table = {"steps": 6, "data": {"accumulate": 3}}
    model, _ = trained(tmp_path / "kept", range(0), **table)
    for kind in ("block", "selective"):
        other, _ = trained(tmp_path / kind, range(0), **table, memory={"activation_checkpointing": kind})
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    trained(tmp_path / "single", range(0), **table, dtype="float32")
    norms = [losses_of(tmp_path / name)[1]["grad_norm"] for name in ("kept", "single")]
    assert norms[0] == pytest.approx(norms[1], rel=5e-3)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="loss_scale: LossScaler: argument 'init_scale': got 0.5, expected 1.0"
    ):
        from_table({"loss_scale": {"init_scale": 0.5}})
    with pytest.raises(UserError, match="unknown key 'loss_scale.initial'"):
        from_table({"loss_scale": {"initial": 2}})
