"""accelerate without Trainer: the same course as without the kernels, saved states, and models it has wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gptcore
from tests.integrations.huggingface_models import batch, model_of, put_on
from tests.integrations.huggingface_training import Tokens

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from gptcore.integrations import huggingface  # noqa: E402


@pytest.fixture(autouse=True)
def without_state() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def swapped(name: str) -> Any:
    model = model_of(name).train()
    put_on(model, "apply")
    return model


class Run:
    """A training run: ``epoch`` returns the losses of four batches, two of them an update."""

    def __init__(self, model: Any, precision: str) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model,
            torch.optim.AdamW(model.parameters(), lr=3e-3),
            torch.utils.data.DataLoader(Tokens(), batch_size=4),
        )

    def epoch(self) -> list[float]:
        losses = []
        for inputs in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**inputs).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_course_is_that_of_eager_and_goes_on_from_a_saved_state(
    name: str, precision: str, tmp_path: Path
):
    theirs = Run(model_of(name).train(), precision)
    wanted = [*theirs.epoch(), *theirs.epoch()]
    ours = Run(swapped(name), precision)
    first = ours.epoch()
    ours.accelerator.save_state(tmp_path)
    second = ours.epoch()
    assert wanted[-1] < wanted[0]
    assert [*first, *second] == pytest.approx(wanted, rel=2e-4 if precision == "no" else 2e-2)
    resumed = Run(swapped(name), precision)
    resumed.accelerator.load_state(tmp_path)
    assert resumed.epoch() == second


def test_the_saved_state_is_that_of_a_model_without_us(tmp_path: Path):
    ours = Run(swapped("llama"), "no")
    ours.epoch()
    ours.accelerator.save_state(tmp_path)
    theirs = Run(model_of("llama").train(), "no")
    theirs.accelerator.load_state(tmp_path)
    assert theirs.epoch() == pytest.approx(ours.epoch(), rel=2e-4)


def test_restoring_a_model_that_was_prepared():
    model, inputs = model_of("llama"), batch("left")
    wanted = model(**inputs).loss
    huggingface.apply_gptcore_to_llama(model=model)
    model.train()
    prepared = Run(model, "bf16").model
    assert prepared(**inputs).logits is None
    huggingface.unapply()
    gptcore.restore(prepared)
    model.forward = model._original_forward  # accelerate keeps the method it wrapped
    again = prepared(**inputs)
    assert again.logits is not None and torch.equal(again.loss, wanted)


def test_what_accelerate_hooked_is_left_and_named():
    model, inputs = model_of("llama"), batch("left")
    with torch.no_grad():
        wanted = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    report = gptcore.replace(model, verbose=False)
    assert "model.norm" in report.left[("LlamaRMSNorm", "another library replaced its forward")]
    with torch.no_grad():
        got = model(**inputs).logits
    kept = inputs["labels"] >= 0
    assert (got - wanted)[kept].abs().max() <= 1e-5 * wanted[kept].abs().max()


def test_what_is_hooked_afterwards_runs_on_the_kernels():
    model, inputs = model_of("llama"), batch("left")
    gptcore.replace(model, verbose=False)
    with torch.no_grad():
        wanted = model(**inputs).logits
        accelerate.cpu_offload(model, execution_device="cpu")
        assert torch.equal(model(**inputs).logits, wanted)
