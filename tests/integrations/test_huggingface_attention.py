"""``attn_implementation="gptcore"`` against transformers' eager attention: logits, loss, gradients, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore import backend
from tests.checkpoint.huggingface_cases import CASES
from tests.integrations.huggingface_models import (
    LENGTH,
    assert_same,
    batch,
    has_route,
    model_of,
    room_for,
    run,
    unlabelled,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from gptcore.integrations import huggingface  # noqa: E402

NAMES = [name for name in CASES if has_route(name, "attn_implementation")]


@pytest.fixture(autouse=True)
def registered() -> None:
    huggingface.register()


@pytest.mark.parametrize("name", NAMES)
def test_without_a_mask_it_is_that_of_eager(name: str):
    model, inputs = model_of(name), batch("no mask")
    wanted = run(model, inputs)
    model.set_attn_implementation(huggingface.ATTENTION_NAME)
    assert_same(run(model, inputs), wanted, inputs["labels"] >= 0)
    assert backend.report() == {}


def greedy(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(
        **unlabelled("left"), do_sample=False, pad_token_id=0, min_new_tokens=24, max_new_tokens=24, **options
    )


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "qwen2", "gemma2", "gemma3", "glm"])
def test_greedy_generation_is_that_of_eager(name: str, cache: str):
    model = model_of(name, **room_for(name, 80))
    options = (
        {"use_cache": False} if cache == "none" else {"cache_implementation": cache, "disable_compile": True}
    )
    wanted = greedy(model, **options)
    model.set_attn_implementation(huggingface.ATTENTION_NAME)
    assert torch.equal(greedy(model, **options), wanted)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3", "glm"]
)
def test_weights_of_attention_come_from_torch(name: str, padding: str):
    model, inputs = model_of(name), batch(padding)
    kept = inputs["labels"] >= 0
    with torch.no_grad():
        wanted = model(**inputs, output_attentions=True)
        model.set_attn_implementation(huggingface.ATTENTION_NAME)
        got = model(**inputs, output_attentions=True)
    layers = len(wanted.attentions)
    assert len(got.attentions) == layers > 0
    for ours, theirs in zip(got.attentions, wanted.attentions, strict=True):
        assert (ours - theirs).transpose(1, 2)[kept].abs().max() <= 1e-5
    assert (got.logits - wanted.logits)[kept].abs().max() <= 1e-5 * wanted.logits[kept].abs().max()
    assert backend.report() == {"transformers attention": {"output_attentions": layers}}
    with torch.no_grad():
        assert model(**inputs).attentions is None
    assert backend.report() == {"transformers attention": {"output_attentions": layers}}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_generation_returns_weights(name: str):
    model = model_of(name)
    options = {
        "output_attentions": True,
        "return_dict_in_generate": True,
        "max_new_tokens": 4,
        "do_sample": False,
    }
    inputs = unlabelled("left")
    wanted = model.generate(**inputs, **options, pad_token_id=0)
    model.set_attn_implementation(huggingface.ATTENTION_NAME)
    got = model.generate(**inputs, **options, pad_token_id=0)
    assert torch.equal(got.sequences, wanted.sequences)
    for ours, theirs in zip(got.attentions[1:], wanted.attentions[1:], strict=True):
        assert all((x - y).abs().max() <= 1e-5 for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_packed_sequences_do_not_see_each_other(name: str):
    model = model_of(name)
    model.set_attn_implementation(huggingface.ATTENTION_NAME)
    tokens = batch("none")["input_ids"][:1]
    places = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=places, use_cache=False).logits
        alone = [model(part).logits for part in (tokens[:, :20], tokens[:, 20:])]
    assert (packed - torch.cat(alone, dim=1)).abs().max() <= 1e-5 * packed.abs().max()


def test_a_window_needs_no_mask():
    """A windowed layer of a whole sequence gets None, which the kernel skips by blocks."""
    config = model_of("mistral").config
    options = {"local_size": 7, "config": config, "mask_function": lambda *_: pytest.fail("a mask was made")}
    assert huggingface.attention.attention_mask(2, 37, 37, 0, 0, **options) is None
    seen = torch.ones(2, 37, dtype=torch.bool)
    assert huggingface.attention.attention_mask(2, 37, 37, 0, 0, attention_mask=seen, **options) is None


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float64), ("llama", torch.float16), ("gemma2", torch.float64)]
)
def test_what_the_kernel_lacks_goes_to_torch_and_is_reported(name: str, dtype: torch.dtype):
    inputs = unlabelled("none")
    model = model_of(name, dtype)
    kept = batch("none")["labels"] >= 0
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.set_attn_implementation(huggingface.ATTENTION_NAME)
        got = model(**inputs).logits
    bound = 1e-5 if dtype == torch.float64 else 2e-2
    assert (got - wanted)[kept].abs().max() <= bound * wanted[kept].abs().max()
    assert backend.report() == {"transformers attention": {f"dtype {dtype}": 3}}


def test_dropout_is_drawn_from_torchs_generator():
    model = model_of("gpt2", attn_pdrop=0.5).train()
    model.set_attn_implementation(huggingface.ATTENTION_NAME)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(**batch("left")).logits)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
