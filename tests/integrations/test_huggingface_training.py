"""transformers' Trainer and PEFT's adapters over a model on the kernels: the same course as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gptcore
from tests.integrations.huggingface_models import gradients_of, model_of, put_on
from tests.integrations.huggingface_training import Tokens, adapted, trained

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from gptcore.integrations import huggingface  # noqa: E402


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_trainer_takes_the_same_course(name: str, tmp_path: Path):
    wanted, _ = trained(model_of(name), tmp_path, updates=8)
    model = model_of(name)
    put_on(model, "apply")
    got, _ = trained(model, tmp_path, updates=8)
    assert len(got) == 9 and wanted[-1] < wanted[0]
    # Trainer logs four digits; rounding of 1e-6 grows with the updates
    assert got == pytest.approx(wanted, rel=2e-4)


def test_trainer_with_bf16_autocast_and_checkpointing(tmp_path: Path):
    settings = {"bf16": True, "gradient_checkpointing": True}
    wanted, _ = trained(model_of("llama"), tmp_path, updates=8, settings=settings)
    model = model_of("llama")
    huggingface.apply_gptcore_to_llama(model=model)
    got, _ = trained(model, tmp_path, updates=8, settings=settings)
    assert got == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("order", ["adapters first", "kernels first"])
def test_adapters_of_peft_train_and_merge(order: str):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    inputs = torch.utils.data.default_collate([Tokens()[i] for i in range(4)])

    def stepped(swap: bool) -> Any:
        model = model_of("llama")
        if swap and order == "kernels first":
            gptcore.replace(model, verbose=False)
        model = adapted(model, settings)
        if swap and order == "adapters first":
            gptcore.replace(model, verbose=False)
        model(**inputs).loss.backward()
        return model

    theirs, ours = stepped(False), stepped(True)
    gradients = gradients_of(theirs)
    assert gradients and all("lora_" in name for name in gradients)
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        if name in gradients:
            wanted = gradients[name]
            assert (parameter.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with torch.no_grad():
        before = ours(**inputs).logits
        merged = ours.merge_and_unload()(**inputs).logits
    assert (merged - before).abs().max() <= 1e-4 * before.abs().max()
