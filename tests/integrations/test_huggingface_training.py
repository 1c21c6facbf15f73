"""transformers' Trainer and PEFT's adapters over a model on the kernels: the same course as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gptcore
from tests.integrations.huggingface_models import model_of, put_on

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from gptcore.integrations import huggingface  # noqa: E402


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that repeat themselves, so that there is something to learn; the last three places are padding."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(20) * (index + 1)) % 59 + 1
        mask = (torch.arange(20) < 17).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": torch.where(mask.bool(), tokens, -100)}


def losses(model: Any, directory: Path, **settings: Any) -> list[float]:
    """The course of eight updates by Trainer."""
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, save_strategy="no",
        **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Tokens(), eval_dataset=Tokens())
    trainer.train()
    course = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*course, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_trainer_takes_the_same_course(name: str, tmp_path: Path):
    wanted = losses(model_of(name), tmp_path)
    model = model_of(name)
    put_on(model, "apply")
    got = losses(model, tmp_path)
    assert len(got) == 9 and wanted[-1] < wanted[0]
    # Trainer logs four digits; rounding of 1e-6 grows with the updates
    assert got == pytest.approx(wanted, rel=2e-4)


def test_trainer_with_bf16_autocast_and_checkpointing(tmp_path: Path):
    settings = {"bf16": True, "gradient_checkpointing": True}
    wanted = losses(model_of("llama"), tmp_path, **settings)
    model = model_of("llama")
    huggingface.apply_gptcore_to_llama(model=model)
    assert losses(model, tmp_path, **settings) == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("order", ["adapters first", "kernels first"])
def test_adapters_of_peft_train_and_merge(order: str):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    inputs = torch.utils.data.default_collate([Tokens()[i] for i in range(4)])

    def adapted(swap: bool) -> Any:
        model = model_of("llama")
        if swap and order == "kernels first":
            gptcore.replace(model, verbose=False)
        torch.manual_seed(5)
        model = peft.get_peft_model(model, settings)
        if swap and order == "adapters first":
            gptcore.replace(model, verbose=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model(**inputs).loss.backward()
        return model

    theirs, ours = adapted(False), adapted(True)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
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
