"""from_peft and to_peft against PEFT itself: the same logits, the same bits back, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.checkpoint import from_hf, from_peft, to_hf, to_peft
from gptcore.checkpoint.peft import CONFIG, WEIGHTS
from gptcore.errors import UserError
from gptcore.infer import SamplingParams, rollout
from gptcore.models import (
    GPT,
    AdapterSpec,
    AttentionSpec,
    GPTConfig,
    MlpSpec,
    NormSpec,
    PositionSpec,
    adapters,
)
from tests.checkpoint.huggingface_cases import CASES

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

# What PEFT adapts in each family: fused and separate projections, rows in another order, a part of the layers.
TARGETS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"], "opt": ["q_proj", "v_proj", "fc2"], "bloom": ["query_key_value"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"], "gptj": "all-linear", "falcon-40b": ["query_key_value"],
    "llama": "all-linear", "llama-biases": ["k_proj", "up_proj", "o_proj"], "qwen3": ["q_proj", "gate_proj", "lm_head"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.set_verbosity_warning()


def base(name: str, directory: Path) -> Any:
    """A transformers model of the case, saved to ``directory``."""
    model_type, settings = CASES[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(directory / "base")
    return model


def theirs(name: str, settings: Any, directory: Path) -> Any:
    """PEFT's model of the case, saved to ``directory``, with no value at its start."""
    model = peft.get_peft_model(base(name, directory), settings).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory / "adapter", save_embedding_layers=False)  # updates alone, of a head too
    return model


def tokens() -> torch.Tensor:
    return torch.randint(1, 61, (2, 21), generator=torch.Generator().manual_seed(2))


def lora(targets: Any, **settings: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)


def same_files(a: Path, b: Path, *names: str) -> None:
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def close(ours: torch.Tensor, their: torch.Tensor) -> None:
    assert (ours - their).abs().max() <= 1e-5 * their.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", TARGETS)
def test_logits_are_those_of_peft_and_files_come_back_bit_for_bit(name: str, dora: bool, tmp_path: Path):
    their = theirs(name, lora(TARGETS[name], use_dora=dora), tmp_path)
    model = from_hf(tmp_path / "base")
    plain = model(tokens())
    spec = from_peft(model, tmp_path / "adapter")
    assert (spec.kind, spec.rank, spec.alpha) == ("dora" if dora else "lora", 4, 6.0)
    with torch.no_grad():
        wanted = their(tokens()).logits
    close(model(tokens()), wanted)
    assert (wanted - plain).abs().max() > 0.01  # the adapter does something
    with adapters.off(model):
        assert torch.equal(model(tokens()), plain)
    to_peft(model, tmp_path / "back", family=CASES[name][0], like=tmp_path / "adapter")
    same_files(tmp_path / "adapter", tmp_path / "back", CONFIG, WEIGHTS)


@pytest.mark.parametrize("settings", [
    {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    {"layers_to_transform": [2], "lora_dropout": 0.3},
])  # fmt: skip
def test_patterns_and_chosen_layers(settings: dict[str, Any], tmp_path: Path):
    their = theirs("llama", lora(["q_proj", "v_proj"], **settings), tmp_path)
    model = from_hf(tmp_path / "base")
    from_peft(model, tmp_path / "adapter")
    close(model(tokens()), their(tokens()).logits)
    to_peft(model, tmp_path / "back", family="llama")  # with a configuration of our own
    again = peft.PeftModel.from_pretrained(
        their.get_base_model(), tmp_path / "back", adapter_name="again"
    ).eval()
    again.set_adapter("again")
    close(model(tokens()), again(tokens()).logits)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "llama", "mistral", "qwen3"])
def test_virtual_tokens_are_those_of_peft(name: str, kind: str, tmp_path: Path):
    make = peft.PromptTuningConfig if kind == "prompt" else peft.PrefixTuningConfig
    their = theirs(name, make(num_virtual_tokens=5, task_type="CAUSAL_LM"), tmp_path)
    model = from_hf(tmp_path / "base")
    from_peft(model, tmp_path / "adapter")
    with torch.no_grad():
        wanted = their(tokens(), attention_mask=torch.ones_like(tokens())).logits
    close(model(tokens()), wanted[:, -tokens().shape[1] :])
    to_peft(model, tmp_path / "back", like=tmp_path / "adapter")
    same_files(tmp_path / "adapter", tmp_path / "back", CONFIG, WEIGHTS)


def our_model() -> GPT:
    """One that Llama's family computes, fused projections and all."""
    return GPT(GPTConfig(
        num_layers=2, width=48, vocab_size=61, context_length=64, attention=AttentionSpec(
            num_heads=4, num_kv_heads=2, qkv_bias=False, out_bias=False
        ),
        norm=NormSpec(kind="rms_norm"), position=PositionSpec(kind="rotary"),
        mlp=MlpSpec(activation="swiglu", bias=False, hidden_size=72),
    ))  # fmt: skip


@pytest.mark.parametrize("spec", [
    AdapterSpec(rank=3, alpha=5.0), AdapterSpec(kind="dora", targets=("q", "v", "value")),
    AdapterSpec(kind="prompt", tokens=4), AdapterSpec(kind="prefix", tokens=4),
], ids=lambda spec: spec.kind)  # fmt: skip
def test_ours_is_read_by_peft_and_comes_back_bit_for_bit(spec: AdapterSpec, tmp_path: Path):
    model = our_model()
    to_hf(model, tmp_path / "base")
    adapters.put_on(model, spec, seed=5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    to_peft(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    their = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = their(tokens(), attention_mask=torch.ones_like(tokens())).logits
    close(model(tokens()), wanted[:, -tokens().shape[1] :])
    other = from_hf(tmp_path / "base")
    from_peft(other, tmp_path / "adapter")
    ours, back = (dict(m.named_parameters()) for m in (model, other))
    assert ours.keys() == back.keys() and all(torch.equal(ours[n], back[n]) for n in ours)


def test_an_f32_adapter_on_a_bf16_model_keeps_its_bits(tmp_path: Path):
    theirs("llama", lora(["q_proj", "down_proj"]), tmp_path)
    model = from_hf(tmp_path / "base", dtype=torch.bfloat16)
    from_peft(model, tmp_path / "adapter")
    assert model(tokens()).isfinite().all()
    to_peft(model, tmp_path / "back", family="llama", like=tmp_path / "adapter")
    same_files(tmp_path / "adapter", tmp_path / "back", WEIGHTS)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generation_with_a_cache_counts_virtual_tokens(kind: str):
    """PEFT dropped a soft prompt silently once a cache was on (peft #2123)."""
    model = talkative(kind)
    prompt, ids = [5, 9, 2], []
    for _ in range(6):  # without a cache, token by token
        ids.append(int(model(torch.tensor([[*prompt, *ids]]))[0, -1].argmax()))
    assert greedy(model, prompt) == ids
    with adapters.off(model):
        assert greedy(model, prompt) != ids


def greedy(model: GPT, prompt: list[int]) -> list[int]:
    """Six tokens by the engine, with its cache."""
    params = SamplingParams(temperature=0.0)
    return rollout(model, [prompt], max_new_tokens=6, params=params).tokens[len(prompt) :].tolist()


def talkative(kind: str) -> GPT:
    model = our_model().eval()
    with torch.no_grad():  # so that it does not repeat a word
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    adapters.put_on(model, AdapterSpec(kind=kind, tokens=4), seed=1)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    return model


REFUSED = {
    "bias": ({"bias": "all"}, "bias = 'all'"),
    "kind": ({"peft_type": "IA3"}, "unknown peft_type 'IA3'"),
    "init": ({"init_lora_weights": "pissa"}, "changed the model's own weights"),
    "more": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_would_be_computed_otherwise_are_refused(case: str, tmp_path: Path):
    change, sentence = REFUSED[case]
    theirs("llama", lora(["q_proj"]), tmp_path)
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = from_hf(tmp_path / "base")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=sentence):
        from_peft(model, tmp_path / "adapter")
    assert [name for name, _ in model.named_parameters()] == names


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    theirs("llama", lora(["q_proj"]), tmp_path)
    model = GPT(
        GPTConfig(
            num_layers=2, width=32, vocab_size=61, context_length=64, attention=AttentionSpec(num_heads=2)
        )
    )
    with pytest.raises(UserError, match="no linear layer of this model"):
        from_peft(model, tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        from_peft(model, tmp_path / "adapter")


def test_parts_of_what_a_family_keeps_whole_are_refused(tmp_path: Path):
    model = GPT(
        GPTConfig(
            num_layers=1, width=32, vocab_size=61, context_length=16, attention=AttentionSpec(num_heads=2)
        )
    )
    adapters.put_on(model, AdapterSpec(targets=("q",)))
    with pytest.raises(UserError, match="gpt2 keeps all outputs of"):
        to_peft(model, tmp_path, family="gpt2")
    assert not list(tmp_path.iterdir())
