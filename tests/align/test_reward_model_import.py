"""Reward models as Hugging Face publishes them: the scores of transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore.align.reward_model import RewardModel
from gptcore.data.examples import Tokenised
from gptcore.errors import UserError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SETTINGS = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 61, "n_positions": 32},
    "llama": {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 61,
        "intermediate_size": 48, "max_position_embeddings": 32,
    },
}  # fmt: skip


def saved(family: str, directory: Path, labels: int = 1) -> torch.nn.Module:
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(family, **SETTINGS[family], num_labels=labels, pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", SETTINGS)
def test_scores_are_those_of_transformers(family: str, tmp_path: Path):
    theirs = saved(family, tmp_path)
    rng = np.random.default_rng(0)
    answers = [Tokenised.of(rng.integers(1, 61, 4), rng.integers(1, 61, n)) for n in (3, 9, 1)]
    ours = RewardModel.from_hf(tmp_path).scores(answers)
    for score, answer in zip(ours, answers, strict=True):
        with torch.no_grad():
            wanted = theirs(torch.from_numpy(answer.tokens.astype(np.int64))[None]).logits[0, 0]
        assert abs(float(score - wanted)) <= 1e-5


def test_several_labels_and_models_without_a_score_are_refused(tmp_path: Path):
    saved("gpt2", tmp_path / "two", labels=2)
    with pytest.raises(UserError, match="one label"):
        RewardModel.from_hf(tmp_path / "two")
    config = transformers.AutoConfig.for_model("gpt2", **SETTINGS["gpt2"])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match=r"holds no 'score.weight'"):
        RewardModel.from_hf(tmp_path / "words")
