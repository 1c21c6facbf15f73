"""GPT-2's decoding block: taken where nothing hinders it, and what it must not change, of layers and of caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import gptcore
from tests.integrations.huggingface_models import batch, model_of, unlabelled

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

GREEDY = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "pad_token_id": 0}


def _swapped(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model as it was, and a copy that gptcore serves."""
    model = model_of("gpt2", dtype)
    ours = copy.deepcopy(model)
    gptcore.replace(ours, verbose=False)
    return model, ours


def _tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return batch("none")["input_ids"][:rows, :length]


def _feed(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of tokens given one by one."""
    return torch.cat(
        [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(tokens.shape[1])], 1
    )


def _assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_decoding_does_not_call_the_layers_in_between(monkeypatch: pytest.MonkeyPatch):
    from transformers.models.gpt2 import modeling_gpt2

    model, ours = _swapped()
    wanted = model.generate(_tokens(), **GREEDY)
    for name in ("GPT2Attention", "GPT2MLP"):
        monkeypatch.setattr(getattr(modeling_gpt2, name), "forward", None)
    assert torch.equal(ours.generate(_tokens(), **GREEDY), wanted)


@pytest.mark.parametrize("place", ["attn", "mlp", "mlp.c_fc", "mlp.act", "ln_2", "attn.resid_dropout"])
def test_a_part_that_somebody_listens_to_is_called(place: str):
    model, ours = _swapped()
    heard = []
    ours.transformer.h[1].get_submodule(place).register_forward_hook(lambda *_: heard.append(1))
    with torch.no_grad():
        _assert_close(ours(_tokens()).logits, model(_tokens()).logits)
    assert heard


def test_a_part_of_another_kind_is_called():
    class Doubled(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    model, ours = _swapped()
    for one in (model, ours):
        one.transformer.h[0].mlp.c_fc = Doubled(one.transformer.h[0].mlp.c_fc)
    with torch.no_grad():
        _assert_close(ours(_tokens()).logits, model(_tokens()).logits)


def test_lora_adapters_count():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, ours = _swapped()
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    torch.manual_seed(0)
    wanted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    got = peft.get_peft_model(ours, config).eval()
    with torch.no_grad():
        _assert_close(got(_tokens()).logits, wanted(_tokens()).logits)


def test_training_mode_still_drops():
    _, ours = _swapped()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with torch.no_grad():
        assert torch.equal(ours(_tokens()).logits, ours(_tokens()).logits)
        ours.train()
        assert not torch.equal(ours(_tokens()).logits, ours(_tokens()).logits)


def test_hidden_states_are_those_of_the_layers():
    model, ours = _swapped()
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, wanted = ours(_tokens(), **options), model(_tokens(), **options)
    assert len(got.hidden_states) == len(wanted.hidden_states)
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        _assert_close(a, b)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=["beams", "lookup"]
)
def test_generation_that_reorders_or_crops_its_cache(options: dict[str, int]):
    model, ours = _swapped()
    tokens = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    assert torch.equal(
        ours.generate(tokens, **GREEDY, **options), model.generate(tokens, **GREEDY, **options)
    )


def test_left_padding():
    model, ours = _swapped()
    inputs = {key: value[:, :14] for key, value in unlabelled("left").items()}
    assert torch.equal(ours.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_a_cache_that_is_cropped_copied_and_continued_twice():
    model, ours = _swapped()
    first, second = _tokens(2, 20), _tokens(2, 30)[:, 10:]

    def course(one: Any) -> list[torch.Tensor]:
        cache = transformers.DynamicCache(config=one.config)
        found = [_feed(one, first, cache)]
        deep = copy.deepcopy(cache)
        shallow = copy.copy(cache)
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        found += [_feed(one, second, deep), _feed(one, second, cache), _feed(one, first, shallow)]
        cache.crop(-25)
        found += [_feed(one, first, cache), _feed(one, first, deep)]
        return found

    for got, wanted in zip(course(ours), course(model), strict=True):
        _assert_close(got, wanted)


def test_a_cache_from_inference_mode_goes_on_outside_of_it():
    model, ours = _swapped()

    def course(one: Any) -> torch.Tensor:
        cache = transformers.DynamicCache(config=one.config)
        with torch.inference_mode():
            _feed(one, _tokens(2, 5), cache)
        with torch.no_grad():
            return _feed(one, _tokens(2, 5), cache)

    _assert_close(course(ours), course(model))


@torch.no_grad()
def test_earlier_keys_do_not_change_under_who_holds_them():
    _, ours = _swapped()
    cache = transformers.DynamicCache(config=ours.config)
    _feed(ours, _tokens(2, 10), cache)
    held, before = cache.layers[0].keys, cache.layers[0].keys.clone()
    _feed(ours, _tokens(2, 10), cache)
    assert torch.equal(held, before) and cache.layers[0].keys.shape[2] == 20
