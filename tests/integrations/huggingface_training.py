"""What transformers' Trainer and PEFT's adapters are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that repeat themselves, so that there is something to learn; the last three places are padding."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(20) * (index + 1)) % 59 + 1
        mask = (torch.arange(20) < 17).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": torch.where(mask.bool(), tokens, -100)}


def trained(
    model: Any, directory: Path, *, updates: int, settings: dict[str, Any] | None = None, **trainers: Any
) -> tuple[list[float], dict[str, float]]:
    """The losses of so many updates and of an evaluation, and its metrics.

    ``settings`` of the arguments, others of the Trainer itself.
    """
    import transformers

    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=updates, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, save_strategy="no",
        **(settings or {}),
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Tokens(), eval_dataset=Tokens(), **trainers
    )
    trainer.train()
    course = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    return [*course, metrics["eval_loss"]], metrics


def adapted(model: Any, settings: Any) -> Any:
    """The model with PEFT's adapters, the same in every call, none of which computes zeros."""
    import peft

    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped
