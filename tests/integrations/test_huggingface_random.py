"""Random configurations of every family: nothing fails, and nothing is silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import gptcore
from gptcore.checkpoint import huggingface
from gptcore.errors import UserError
from tests.integrations.huggingface_models import built

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from gptcore.integrations import huggingface as integration  # noqa: E402

ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu", "relu2", "mish"]
FAMILIES = ["gpt2", "opt", "bloom", "gpt_neox", "gptj", "falcon", "llama", "mistral", "qwen2", "qwen3", "gemma2",
            "gemma3_text", "glm", "glm4", "mixtral", "phi", "olmo2", "starcoder2", "cohere"]  # fmt: skip


@st.composite
def configurations(draw: Any) -> tuple[str, dict[str, Any]]:
    """A family and sizes it accepts, odd ones among them; the last families are not among those we name."""
    family = draw(st.sampled_from(FAMILIES))
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4) if heads % n == 0]))
    size = draw(st.sampled_from([4, 6, 8, 10, 16, 20]))
    rotates = family in ("gpt_neox", "gptj", "phi")  # a quarter or a part of the head, which must be even
    size = 16 if rotates or family in ("glm", "glm4") else 8 if family == "mixtral" else size
    width = heads * size
    layers = draw(st.integers(1, 3))
    own: dict[str, Any] = {
        "gpt2": {
            "n_embd": width, "n_head": heads, "n_layer": layers,
            "activation_function": draw(st.sampled_from(ACTIVATIONS)),
            "scale_attn_by_inverse_layer_idx": draw(st.booleans()), "scale_attn_weights": draw(st.booleans()),
            "reorder_and_upcast_attn": draw(st.booleans()),
        },
        "gptj": {"n_embd": width, "n_head": heads, "n_layer": layers, "rotary_dim": draw(st.sampled_from([2, 8, 16]))},
        "bloom": {"hidden_size": width, "n_head": heads, "n_layer": layers},
        "falcon": {
            "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers, "num_kv_heads": groups,
            "new_decoder_architecture": draw(st.booleans()), "multi_query": draw(st.booleans()),
            "parallel_attn": draw(st.booleans()), "bias": draw(st.booleans()), "alibi": draw(st.booleans()),
        },
        "opt": {
            "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers, "ffn_dim": width + 3,
            "do_layer_norm_before": draw(st.booleans()), "enable_bias": draw(st.booleans()),
            "activation_function": draw(st.sampled_from(ACTIVATIONS)), "dropout": 0.0,
        },
    }.get(family, {
        "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": groups, "num_hidden_layers": layers,
        "intermediate_size": width + 5, "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "attention_bias": draw(st.booleans()), "tie_word_embeddings": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([2, 5, 100])),
    })  # fmt: skip
    if family == "falcon":  # two settings that transformers' own code cannot run are ruled out
        own["parallel_attn"] |= own["new_decoder_architecture"]
        if not (own["new_decoder_architecture"] or own["multi_query"]):
            own["num_kv_heads"] = heads
    if family == "mixtral":
        # torch's grouped products want rows of whole 16 bytes
        own |= {"num_local_experts": draw(st.integers(2, 5)), "output_router_logits": draw(st.booleans())}
        own["intermediate_size"] = width + 8
    if family in ("gemma2", "gemma3_text"):
        caps = st.sampled_from([None, 0.5, 20.0])
        own |= {"attn_logit_softcapping": draw(caps), "final_logit_softcapping": draw(caps)}
    if family in ("gpt_neox", "phi"):
        own.pop("num_key_value_heads", None)
    if family in ("qwen3", "gemma2", "gemma3_text", "glm", "glm4"):
        own["head_dim"] = size
    sizes = {"vocab_size": draw(st.integers(7, 40)), "pad_token_id": 0, "max_position_embeddings": 32}
    return family, {**sizes, **own}


def inputs_of(vocabulary: int, data: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tokens with a mask, and which places are none of padding."""
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    tokens = torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    if length > 2 and data.draw(st.booleans()):
        mask[0, :2] = 0
    elif length > 2 and data.draw(st.booleans()):
        mask[0, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}, mask.bool()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=configurations(), data=st.data())
def test_replace_changes_no_result(drawn: tuple[str, dict[str, Any]], data: Any):
    model = built(*drawn)
    inputs, kept = inputs_of(drawn[1]["vocab_size"], data)
    with torch.no_grad():
        wanted = model(**inputs).logits
        gptcore.replace(model, verbose=False)
        got = model(**inputs).logits
    assert (got - wanted)[kept].abs().max() <= 1e-5 * wanted[kept].abs().max()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=configurations(), data=st.data())
def test_from_hf_computes_the_same_or_refuses(
    drawn: tuple[str, dict[str, Any]], data: Any, tmp_path_factory: Any
):
    model = built(*drawn)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    try:
        ours = huggingface.from_hf(directory)
    except UserError as error:
        assert "config.json" in str(error) or "model_type" in str(error) or "position" in str(error), str(
            error
        )
        return
    inputs, _ = inputs_of(drawn[1]["vocab_size"], data)
    with torch.no_grad():
        wanted, got = model(inputs["input_ids"]).logits, ours(inputs["input_ids"])
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=configurations(), data=st.data())
def test_apply_changes_neither_loss_nor_gradients(drawn: tuple[str, dict[str, Any]], data: Any):
    apply = getattr(integration, f"apply_gptcore_to_{drawn[0].removesuffix('_text')}", None)
    assume(apply is not None)
    model = built(*drawn)
    inputs, kept = inputs_of(drawn[1]["vocab_size"], data)
    labels = inputs["input_ids"].masked_fill(~kept, -100)
    labels[:, (~kept).sum(dim=1).max() :][:, :1] = -100  # what follows padding sees nothing that counts
    assume((labels[:, 1:] >= 0).any())

    def run(**options: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**inputs, labels=labels, **options).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    wanted = run()
    try:
        apply(model=model)
        got = run(skip_logits=True)
    finally:
        integration.unapply()
    largest = max(gradient.abs().max() for gradient in wanted[1:])
    assert len(got) == len(wanted) and abs(got[0] - wanted[0]) <= 1e-5 * wanted[0]
    assert all((x - y).abs().max() <= 1e-5 * largest for x, y in zip(got[1:], wanted[1:], strict=True))
