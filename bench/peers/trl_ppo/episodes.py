"""TRL's PPO over a setting that ``bench.ppo`` wrote: seconds of each update, mean rewards and the peak of memory.

    python episodes.py SETTING.json        in the environment of requirements.txt; prints one JSON object

The reward model is a table instead of a network, which costs the peer less than it would pay. ``precision`` is float32,
bfloat16 (weights and Adam's moments too) or mixed (bf16 products over f32 weights).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from record import Record
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer
from worth import worth


class Judge(torch.nn.Module):
    """What TRL takes for a reward model: it reads tokens as they are and scores each sequence by a rule."""

    base_model_prefix = "backbone"

    def __init__(self, setting: dict[str, Any], record: Record) -> None:
        super().__init__()
        self.setting, self.record = setting, record
        self.backbone = lambda input_ids, **_: SimpleNamespace(hidden_states=[input_ids])

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        scores = [worth(self.setting, row) for row in ids.tolist()]
        self.record.judged(scores)
        return torch.tensor(scores)[:, None, None].expand(-1, ids.shape[1], 1)


def main() -> None:
    setting = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(setting["threads"])
    record = Record()
    where, episodes, minibatch = setting["model"], setting["episodes"], setting["minibatch"]
    precision = setting["precision"]
    options = {"dtype": torch.bfloat16 if precision == "bfloat16" else torch.float32}
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=setting["out"], num_mini_batches=episodes // minibatch,
            # not a minibatch times as many accumulations: accelerate would step once an epoch then
            per_device_train_batch_size=episodes, gradient_accumulation_steps=1,
            total_episodes=episodes * setting["updates"], num_ppo_epochs=setting["epochs"],
            local_rollout_forward_batch_size=episodes, response_length=setting["response"],
            learning_rate=setting["lr"], lr_scheduler_type="constant", kl_coef=setting["beta"], temperature=1.0,
            stop_token_id=setting["end"], num_sample_generations=0, gradient_checkpointing=False,
            bf16=precision == "mixed",
            use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        ),
        processing_class=_tokenizer(setting),
        model=AutoModelForCausalLM.from_pretrained(where, **options),
        ref_model=AutoModelForCausalLM.from_pretrained(where, **options),
        value_model=AutoModelForSequenceClassification.from_pretrained(where, num_labels=1, **options),
        reward_model=Judge(setting, record),
        train_dataset=Dataset.from_dict({"input_ids": setting["prompts"] * 8}),
        eval_dataset=Dataset.from_dict({"input_ids": setting["prompts"]}),
    )  # fmt: skip
    trainer.train()
    print(record.finish())


def _tokenizer(setting: dict[str, Any]) -> PreTrainedTokenizerFast:
    """One word for each id; ids come from outside, so only those of end and padding are ever asked for."""
    words = {str(number): number for number in range(setting["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end, pad = str(setting["end"]), str(setting["pad"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=pad, padding_side="left"
    )


if __name__ == "__main__":
    main()
