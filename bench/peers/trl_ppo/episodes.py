"""TRL's PPO over a setting that ``bench.ppo`` wrote: seconds of each update, mean rewards and the peak of memory.

    python episodes.py SETTING.json        in the environment of requirements.txt; prints one JSON object

The reward model is a table instead of a network, which costs the peer less than it would pay.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer
from worth import worth


class Judge(torch.nn.Module):
    """What TRL takes for a reward model: it reads tokens as they are and scores each sequence by a rule."""

    base_model_prefix = "backbone"

    def __init__(self, setting: dict[str, Any], times: list[float], rewards: list[float]) -> None:
        super().__init__()
        self.setting, self.times, self.rewards = setting, times, rewards
        self.backbone = lambda input_ids, **_: SimpleNamespace(hidden_states=[input_ids])

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        scores = torch.tensor([worth(self.setting, row) for row in ids.tolist()])
        self.times.append(time.perf_counter())
        self.rewards.append(float(scores.mean()))
        return scores[:, None, None].expand(-1, ids.shape[1], 1)


def main() -> None:
    setting = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(setting["threads"])
    times: list[float] = []
    rewards: list[float] = []
    where, episodes, minibatch = setting["model"], setting["episodes"], setting["minibatch"]
    options = {"dtype": getattr(torch, setting["dtype"])}
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=setting["out"], per_device_train_batch_size=minibatch,
            gradient_accumulation_steps=episodes // minibatch, num_mini_batches=episodes // minibatch,
            total_episodes=episodes * setting["updates"], num_ppo_epochs=setting["epochs"],
            local_rollout_forward_batch_size=episodes, response_length=setting["response"],
            learning_rate=setting["lr"], lr_scheduler_type="constant", kl_coef=setting["beta"], temperature=1.0,
            stop_token_id=setting["end"], num_sample_generations=0, gradient_checkpointing=False, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        ),
        processing_class=_tokenizer(setting),
        model=AutoModelForCausalLM.from_pretrained(where, **options),
        ref_model=AutoModelForCausalLM.from_pretrained(where, **options),
        value_model=AutoModelForSequenceClassification.from_pretrained(where, num_labels=1, **options),
        reward_model=Judge(setting, times, rewards),
        train_dataset=Dataset.from_dict({"input_ids": setting["prompts"] * 8}),
        eval_dataset=Dataset.from_dict({"input_ids": setting["prompts"]}),
    )  # fmt: skip
    trainer.train()
    times.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(times)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "rewards": rewards, "peak_mib": peak}))


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
