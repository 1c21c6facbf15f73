"""``generate`` with every cache and every way of decoding that transformers has on the CPU: the tokens of eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gptcore
from tests.checkpoint.huggingface_cases import CASES
from tests.integrations.huggingface_models import (
    OWN_ATTENTION,
    ROUTES,
    batch,
    has_route,
    model_of,
    put_on,
    room_for,
    unlabelled,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import cache_utils  # noqa: E402

NEW = 16
FAMILIES = ["gpt2", "opt", "bloom", "gpt_neox", "gptj", "falcon", "llama", "mistral", "gemma3"]
WINDOWED = ("mistral", "gemma3")

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "fp8": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "quanto": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    "hqq": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}},
    "none": {"use_cache": False},
}
DECODING: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams, static": {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 8},
    "chunked prefill, static": {
        "prefill_chunk_size": 8, "cache_implementation": "static", "disable_compile": True
    },
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}  # fmt: skip


def long_model(name: str) -> Any:
    return model_of(name, **room_for(name, 80))


def by_every_route(name: str) -> Iterator[Any]:
    """The model on the kernels by each of the routes that its family has."""
    for route in ROUTES:
        if has_route(name, route):
            model = long_model(name)
            put_on(model, route)
            yield model


def tokens_of(model: Any, inputs: dict[str, Any] | None = None, **options: Any) -> torch.Tensor:
    if inputs is None:
        inputs = unlabelled("left")
    torch.manual_seed(4)
    settings = {
        "do_sample": False,
        "min_new_tokens": NEW,
        "max_new_tokens": NEW,
        "pad_token_id": 0,
        **options,
    }
    return model.generate(**inputs, **settings)


def compare(name: str, options: dict[str, Any], inputs: dict[str, Any] | None = None) -> None:
    wanted = tokens_of(long_model(name), inputs, **options)
    for model in by_every_route(name):
        assert torch.equal(tokens_of(model, inputs, **options), wanted)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_of_every_cache(name: str, cache: str):
    if cache in ("quanto", "hqq"):
        pytest.importorskip(
            {"quanto": "optimum.quanto"}.get(cache, cache), reason=f"{cache} is not installed"
        )
    if name in WINDOWED and "cache_config" in CACHES[cache]:
        pytest.skip("transformers quantizes no cache with windows")
    compare(name, CACHES[cache])


def test_the_caches_that_offload_need_an_accelerator():
    """So that the day transformers can do it on the CPU, the table above is extended."""
    for implementation in ("offloaded", "offloaded_static"):
        with pytest.raises((AssertionError, RuntimeError)):
            tokens_of(long_model("llama"), cache_implementation=implementation, disable_compile=True)


def test_every_cache_class_is_one_of_the_tables():
    """Encoder-decoder, linear attention and drafting caches belong to models without the kernels' attention."""
    kinds = [kind for kind in vars(cache_utils).values() if isinstance(kind, type)]
    classes = {kind.__name__ for kind in kinds if issubclass(kind, cache_utils.Cache)}
    ours = {"Cache", "DynamicCache", "StaticCache", "QuantizedCache"}
    assert classes - ours <= {"EncoderDecoderCache", "MtpCache", "DFlashCache"}


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon", "gemma3"])
def test_tokens_of_every_way_of_decoding(name: str, decoding: str):
    if (name, decoding) == ("falcon", "chunked prefill, static"):
        pytest.skip("transformers makes its cache for as many key heads as there are query heads, and fails")
    compare(name, DECODING[decoding])


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama", "gemma3"])
@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
def test_speculative_decoding(name: str, kind: str):
    tokens = batch("none")["input_ids"][1:]
    inputs = {"input_ids": torch.cat([tokens[:, :12], tokens[:, :12]], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    wanted = tokens_of(long_model(name), inputs)
    for model in by_every_route(name):
        if kind == "prompt lookup":
            options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
        else:
            draft = long_model(name)
            gptcore.replace(draft, verbose=False)
            options = {"assistant_model": draft}
        assert torch.equal(tokens_of(model, inputs, **options), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_a_cache_of_the_users_is_continued(name: str):
    """A second call goes on where the first one's cache ends, and with a cache of fixed length."""
    inputs = {"input_ids": batch("none")["input_ids"]}

    def twice(model: Any, cache: Any) -> torch.Tensor:
        first = tokens_of(model, {**inputs, "past_key_values": cache})
        return tokens_of(model, {"input_ids": first, "past_key_values": cache}, max_new_tokens=NEW)

    config = long_model(name).config
    for kind, options in ((cache_utils.DynamicCache, {}), (cache_utils.StaticCache, {"max_cache_len": 80})):
        wanted = twice(long_model(name), kind(config=config, **options))
        for model in by_every_route(name):
            assert torch.equal(twice(model, kind(config=config, **options)), wanted)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] in OWN_ATTENTION])
def test_the_weights_of_attention_come_from_the_layer_itself(name: str):
    model, inputs = model_of(name), batch("left")
    wanted = model(**inputs, output_attentions=True)
    gptcore.replace(model, verbose=False)
    got = model(**inputs, output_attentions=True)
    for ours, theirs in zip(got.attentions, wanted.attentions, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5
    assert gptcore.backend.report()["transformers attention"]["output_attentions"] >= 3


def test_continuous_batching_takes_transformers_attention():
    """It names what it takes; with sdpa the rest of the model stays on the kernels."""
    model = long_model("llama")
    config = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    prompts = [[1, 2, 3, 4], [5, 6, 7]]

    def tokens() -> list[list[int]]:
        outputs = model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=sizes
        )
        return sorted(out.generated_tokens for out in outputs.values())

    model.set_attn_implementation("sdpa")
    wanted = tokens()
    gptcore.replace(model, verbose=False)
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        tokens()
    model.set_attn_implementation("sdpa")
    assert tokens() == wanted
