"""``gptcore.replace`` on transformers' models: logits, loss, gradients and generation stay those of eager."""

from __future__ import annotations

import pytest
import torch

import gptcore
from gptcore import backend
from tests.checkpoint.huggingface_cases import CASES
from tests.integrations.huggingface_models import OWN_ATTENTION, batch, model_of, run

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("name", CASES)
def test_restore_gives_everything_back(name: str):
    model, inputs = model_of(name), batch("left")
    wanted, classes = run(model, inputs), [type(m) for m in model.modules()]
    gptcore.replace(model, verbose=False)
    assert [type(m) for m in model.modules()] != classes
    gptcore.restore(model)
    assert [type(m) for m in model.modules()] == classes and model.config._attn_implementation == "eager"
    again = run(model, inputs)
    assert torch.equal(again.logits, wanted.logits)
    assert all(torch.equal(again.gradients[key], gradient) for key, gradient in wanted.gradients.items())


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_a_family_is_left(name: str):
    report = gptcore.replace(model_of(name), verbose=False)
    assert report.left == {}
    assert len(report.swapped["attention"]) == (3 if CASES[name][0] in OWN_ATTENTION else 1)
    assert "LayerNorm" in report.swapped or "RMSNorm" in report.swapped
    gated = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "glm", "glm4"}
    assert ("gated feed-forward" in report.swapped) == (CASES[name][0] in gated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gptj", "falcon-40b", "llama", "gemma3", "glm4"])
def test_generation_runs_on_the_kernels(name: str, dtype: torch.dtype):
    model = model_of(name, dtype)
    tokens = batch("none")["input_ids"][:, :9]
    options = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16, "pad_token_id": 0}
    wanted = model.generate(tokens, **options)
    gptcore.replace(model, verbose=False)
    got = model.generate(tokens, **options)
    if dtype == torch.float32:  # in bf16 two logits of these small models are often the same number
        assert torch.equal(got, wanted)
    assert got.shape == wanted.shape and "layer_norm" not in backend.report()
