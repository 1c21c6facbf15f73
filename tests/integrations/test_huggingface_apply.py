"""``apply_gptcore_to_*``: one line before construction or on a live model, and what transformers does with it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import gptcore
from gptcore import backend
from tests.checkpoint.huggingface_cases import CASES
from tests.integrations.huggingface_models import (
    Run,
    apply_to,
    assert_same,
    batch,
    gradients_of,
    has_route,
    model_of,
    put_on,
    run,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from gptcore.integrations import huggingface  # noqa: E402

NAMES = [name for name in CASES if has_route(name, "apply")]


@pytest.mark.parametrize("name", NAMES)
def test_training_computes_the_loss_without_logits(name: str):
    model, inputs = model_of(name), batch("left")
    wanted = run(model, inputs)
    put_on(model, "apply")
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    out = model(**inputs)
    model.zero_grad()
    out.loss.backward()
    assert out.logits is None
    assert_same(Run(None, out.loss.detach(), gradients_of(model)), wanted)
    assert not {"fused_linear_cross_entropy", "transformers attention"} & backend.report().keys()


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gpt_neox", "llama", "gemma2", "qwen3"])
def test_models_built_afterwards_are_swapped_and_unapply_stops_it(name: str, tmp_path: Path):
    original = model_of(name)
    original.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = original(batch("left")["input_ids"]).logits
    apply_to(CASES[name][0])()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    # BLOOM has no choice; for Gemma 2 transformers chooses eager, as a user may
    kept = name in ("bloom", "gemma2")
    assert model.config._attn_implementation == ("eager" if kept else huggingface.ATTENTION_NAME)
    assert type(model) is not type(original) and type(model).__name__ == type(original).__name__
    with torch.no_grad():
        got = model(batch("left")["input_ids"]).logits
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    model.save_pretrained(tmp_path / "again")
    huggingface.unapply()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is type(original) and again.config._attn_implementation != huggingface.ATTENTION_NAME
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in original.state_dict().items())


class OwnMLP(torch.nn.Module):
    """What a user puts in the place of LLaMA's feed-forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = self.up_proj = torch.nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = torch.nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x))


def test_classes_that_the_user_mapped_stay():
    from transformers import monkey_patching

    monkey_patching.register_patch_mapping({"LlamaMLP": OwnMLP})
    try:
        huggingface.apply_gptcore_to_llama()
        config = transformers.AutoConfig.for_model("llama", **CASES["llama"][1])
        model = transformers.AutoModelForCausalLM.from_config(config)
    finally:
        monkey_patching.unregister_patch_mapping(["LlamaMLP"])
    layer = model.model.layers[0]
    assert type(layer.mlp) is OwnMLP and type(layer.input_layernorm).__name__ == "LlamaRMSNorm"
    assert hasattr(layer.input_layernorm, "kernel_forward")
    assert hasattr(transformers.LlamaForCausalLM(config), "kernel_forward")  # no Auto class, no mapping


def test_an_attention_that_the_user_chose_stays(tmp_path: Path):
    model_of("llama").save_pretrained(tmp_path)
    huggingface.apply_gptcore_to_llama()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("rms_norm", "RMSNorm"),
        ("swiglu", "gated feed-forward"),
        ("fused_linear_cross_entropy", "linear_cross_entropy"),
    ],
)
def test_options_leave_parts_out(option: str, kind: str):
    assert kind in huggingface.apply_gptcore_to_llama(model=model_of("llama")).swapped
    assert kind not in huggingface.apply_gptcore_to_llama(model=model_of("llama"), **{option: False}).swapped


def test_rotary_is_patched_for_the_family_and_back():
    from transformers.models.llama import modeling_llama as modeling

    before = modeling.apply_rotary_pos_emb
    huggingface.apply_gptcore_to_llama(rope=False)
    assert modeling.apply_rotary_pos_emb is before
    huggingface.apply_gptcore_to_llama()
    huggingface.apply_gptcore_to_llama()
    generator = torch.Generator().manual_seed(1)
    q, k = (
        torch.randn(2, 5, heads, 12, generator=generator).transpose(1, 2).requires_grad_() for heads in (4, 2)
    )
    angles = torch.randn(2, 5, 6, generator=generator).repeat(1, 1, 2)
    for cos, sin in ((angles.cos(), angles.sin()), (angles[:1].cos(), angles[:1].sin())):
        wanted, got = before(q, k, cos, sin), modeling.apply_rotary_pos_emb(q, k, cos, sin)
        for x, y in zip(got, wanted, strict=True):
            assert x.shape == y.shape and (x - y).abs().max() <= 1e-6 * y.abs().max()
        wanted, got = (torch.autograd.grad(x[0].square().sum() + x[1].sum(), (q, k)) for x in (wanted, got))
        for x, y in zip(got, wanted, strict=True):
            assert (x - y).abs().max() <= 1e-6 * y.abs().max()
    huggingface.unapply()
    assert modeling.apply_rotary_pos_emb is before


def test_the_loss_takes_what_trainers_pass():
    model, inputs = model_of("llama"), batch("right")
    huggingface.apply_gptcore_to_llama(model=model)
    model.eval()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for extra in (
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": shifted},
    ):
        wanted, got = (model(**inputs, **extra, skip_logits=skip).loss for skip in (False, True))
        assert abs(got - wanted) <= 1e-5 * wanted
    loss, *_ = model(**inputs, skip_logits=True, return_dict=False)
    assert abs(loss - model(**inputs).loss) <= 1e-5 * loss
    positional = model(
        inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], skip_logits=True
    )
    assert torch.equal(positional.loss, loss) and positional.logits is None
    names = list(inspect.signature(model.forward).parameters)
    assert names[0] == "input_ids" and "labels" in names


@pytest.mark.parametrize("asked", ["by the call", "by the configuration"])
def test_the_balance_of_experts_stays_in_the_loss(asked: str):
    model, inputs = model_of("mixtral", router_aux_loss_coef=0.7), batch("left")
    if asked == "by the call":
        inputs["output_router_logits"] = True
    else:
        model.config.output_router_logits = True
    wanted, gradients = model(**inputs), run(model, inputs).gradients
    huggingface.apply_gptcore_to_mixtral(model=model)
    got = model(**inputs, skip_logits=True)
    assert got.logits is None and len(got.router_logits) == 3
    assert abs(got.aux_loss - wanted.aux_loss) <= 1e-5 * wanted.aux_loss
    assert abs(got.loss - wanted.loss) <= 1e-5 * wanted.loss
    model.zero_grad()
    got.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * gradients[name].abs().max(), name


def test_a_head_of_another_kind_keeps_the_models_loss():
    model, inputs = model_of("llama"), batch("none")
    wanted = model(**inputs).loss

    class Head(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    model.lm_head.__class__ = Head
    huggingface.apply_gptcore_to_llama(model=model)
    assert torch.equal(model(**inputs, skip_logits=True).logits, model(**inputs).logits)
    assert abs(model(**inputs, skip_logits=True).loss - wanted) <= 1e-5 * wanted
    assert "head of type Head" in backend.report()["fused_linear_cross_entropy"]


def test_gradient_checkpointing_gives_the_same_gradients():
    model, inputs = model_of("llama"), batch("left")
    huggingface.apply_gptcore_to_llama(model=model)
    model.train()
    model(**inputs).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))


def test_restore_gives_the_model_back():
    model, inputs = model_of("gpt2"), batch("left")
    wanted = run(model, inputs)
    huggingface.apply_gptcore_to_gpt2(model=model)
    gptcore.restore(model)
    again = run(model, inputs)
    assert torch.equal(again.logits, wanted.logits) and torch.equal(again.loss, wanted.loss)
    assert model.config._attn_implementation == "eager"
