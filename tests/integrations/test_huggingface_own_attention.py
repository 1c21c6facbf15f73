"""The attention of BLOOM, GPT-J and Falcon, which is swapped layer by layer: what their eager layers compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gptcore
from gptcore import backend, ops
from gptcore.integrations.swap import Report, swap_modules
from tests.checkpoint.huggingface_cases import CASES
from tests.integrations.huggingface_models import (
    LENGTH,
    OWN_ATTENTION,
    assert_same,
    batch,
    model_of,
    run,
    unlabelled,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from gptcore.integrations.huggingface import own_attention  # noqa: E402

NAMES = [name for name in CASES if CASES[name][0] in OWN_ATTENTION]
ATTENTION = "transformers attention"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of the attention kernel."""
    seen: list[dict[str, Any]] = []
    original = ops.attention

    def attention(*tensors: Any, **options: Any) -> Any:
        seen.append(options)
        return original(*tensors, **options)

    monkeypatch.setattr(ops, "attention", attention)
    return seen


@pytest.mark.parametrize("padding", ["no mask", "none", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_come_to_the_kernel_in_their_cheapest_form(
    name: str, padding: str, calls: list[dict[str, Any]]
):
    model, inputs = model_of(name), batch(padding)
    wanted = run(model, inputs)
    gptcore.replace(model, verbose=False)
    calls.clear()
    assert_same(run(model, inputs), wanted, inputs["labels"] >= 0)
    assert len(calls) == 3 and ATTENTION not in backend.report()
    for options in calls:
        assert options["causal"] == (padding in ("no mask", "none"))
        assert ("attn_mask" in options) == (padding in ("left", "right"))
        assert ("attn_bias" in options) == (name == "bloom")
        if name == "bloom":
            assert options["attn_bias"].shape[2] == 1


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_errs_no_more_than_twice_eager(name: str, padding: str):
    inputs, kept = unlabelled(padding), batch(padding)["labels"] >= 0
    exact, rounded = model_of(name), model_of(name, torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    with torch.no_grad():
        wanted, eager = exact(**inputs).logits, rounded(**inputs).logits
        gptcore.replace(rounded, verbose=False)
        ours = rounded(**inputs).logits
    theirs = (eager - wanted)[kept].square().mean().sqrt()
    assert (ours - wanted)[kept].square().mean().sqrt() <= 2 * theirs
    assert ATTENTION not in backend.report()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("padding", ["no mask", "left"])
def test_falcon_with_alibi_and_by_sdpa(padding: str, alibi: bool, attention: str):
    """transformers' eager Falcon adds ALiBi twice, its sdpa once; each is followed."""
    model, inputs = model_of("falcon", alibi=alibi), batch(padding)
    model.config._attn_implementation = attention
    wanted = run(model, inputs)
    gptcore.replace(model, verbose=False)
    assert_same(run(model, inputs), wanted, inputs["labels"] >= 0)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["gptj", "falcon"])
def test_masks_of_the_users(name: str):
    """A mask of four dimensions may let tokens see the future, or weigh them."""
    model, tokens = model_of(name), batch("none")["input_ids"]
    generator = torch.Generator().manual_seed(1)
    masks = [torch.zeros(2, 1, LENGTH, LENGTH), torch.randn(2, 1, LENGTH, LENGTH, generator=generator)]
    masks[0][..., LENGTH // 2 :] = torch.finfo(torch.float32).min
    with torch.no_grad():
        wanted = [model(tokens, attention_mask=mask).logits for mask in masks]
        gptcore.replace(model, verbose=False)
        for mask, logits in zip(masks, wanted, strict=True):
            got = model(tokens, attention_mask=mask).logits
            assert (got - logits).abs().max() <= 1e-5 * logits.abs().max()
        masks[0].copy_(masks[1])
        got = model(tokens, attention_mask=masks[0]).logits
        assert (got - wanted[1]).abs().max() <= 1e-5 * wanted[1].abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_with_holes(name: str):
    """ALiBi counts the tokens that are seen, not the places."""
    model, inputs = model_of(name), unlabelled("none")
    inputs["attention_mask"][:, 5:8] = 0
    with torch.no_grad():
        wanted = model(**inputs).logits
        gptcore.replace(model, verbose=False)
        got = model(**inputs).logits
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_dtypes_the_kernel_lacks_stay_on_torch(name: str, dtype: torch.dtype):
    model, inputs = model_of(name, dtype), unlabelled("left")
    with torch.no_grad():
        wanted = model(**inputs).logits
        swap_modules(model, own_attention.RULES, Report())
        backend.reset_report()
        assert torch.equal(model(**inputs).logits.nan_to_num(), wanted.nan_to_num())
    assert backend.report()[ATTENTION] == {f"dtype {dtype} on cpu": 3}


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_under_autocast(name: str):
    model, inputs = model_of(name), batch("left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model(**inputs)
        gptcore.replace(model, verbose=False)
        got = model(**inputs)
    kept = inputs["labels"] >= 0
    assert got.logits.dtype == wanted.logits.dtype
    assert (got.logits - wanted.logits)[kept].abs().max() <= 0.03 * wanted.logits[kept].abs().max()
    assert ATTENTION not in backend.report()


@pytest.mark.parametrize(
    ("name", "setting"), [("bloom", "attention_dropout"), ("gptj", "attn_pdrop"), ("falcon", "attention_dropout")]
)  # fmt: skip
def test_dropout_and_swapping_in_training(name: str, setting: str):
    """The trial before swapping draws nothing; dropout is drawn from torch's generator."""
    others = {"hidden_dropout": 0.0} if name != "gptj" else {}
    model = model_of(
        name, **{**others, setting: 0.5}, **({"alibi": True} if name == "falcon" else {})
    ).train()
    state = torch.random.get_rng_state()
    report = gptcore.replace(model, verbose=False)
    assert len(report.swapped["attention"]) == 3 and report.left == {}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(**unlabelled("left")).logits)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_what_is_not_swapped_is_named():
    model = model_of("bloom", pretraining_tp=2, slow_but_exact=True)
    report = gptcore.replace(model, verbose=False)
    assert report.left[("BloomAttention", "slow_but_exact")] == [
        f"transformer.h.{i}.self_attention" for i in range(3)
    ]
    assert report.left[("BloomForCausalLM", "its attention is its own")] == ["the model"]
    assert "attention" not in report.swapped


@pytest.mark.parametrize("name", NAMES)
def test_again_and_back(name: str):
    model = model_of(name)
    gptcore.replace(model, verbose=False)
    assert own_attention.is_swapped(model)
    assert gptcore.replace(model, verbose=False).left == {}
    gptcore.restore(model)
    assert not own_attention.is_swapped(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_checkpointing_gives_the_same_gradients(name: str, reentrant: bool):
    model, inputs = model_of(name), batch("left")
    gptcore.replace(model, verbose=False)
    wanted = run(model, inputs).gradients
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = run(model, inputs).gradients
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
