"""from_hf and to_hf against transformers itself: the same logits, the same bits back, and refusals by name."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.checkpoint import huggingface
from gptcore.errors import UserError
from gptcore.models import GPT, presets
from tests.checkpoint.huggingface_cases import CASES

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


NULL = object()  # of config.json; None in a change removes the key


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.set_verbosity_warning()


def theirs(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model of the case, whose biases and gains are not at their trivial start."""
    model_type, settings = CASES[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.to(dtype)


def tokens() -> torch.Tensor:
    return torch.randint(1, 61, (2, 37), generator=torch.Generator().manual_seed(2))


def reload(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path):
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = huggingface.from_hf(tmp_path)
    with torch.no_grad():
        wanted, got = model(tokens()).logits, ours(tokens())
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_there_and_back_is_bitwise(name: str, dtype: torch.dtype, tmp_path: Path):
    model = theirs(name, dtype)
    model.save_pretrained(tmp_path / "theirs")
    ours = huggingface.from_hf(tmp_path / "theirs")
    assert next(ours.parameters()).dtype == dtype
    huggingface.to_hf(ours, tmp_path / "ours", family=CASES[name][0])
    back = reload(tmp_path / "ours").state_dict()
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_the_same_in_whatever_family_we_write(name: str, tmp_path: Path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs")
    huggingface.to_hf(huggingface.from_hf(tmp_path / "theirs"), tmp_path / "ours")
    with torch.no_grad():
        wanted, got = model(tokens()).logits, reload(tmp_path / "ours")(tokens()).logits
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "preset", ["gpt2", "opt-125m", "opt-350m", "bloom-560m", "llama-7b", "llama3-8b", "quickstart"]
)
def test_presets_find_their_family(preset: str):
    written = huggingface.write_config(presets.get(preset))
    wanted = {"opt-125m": "opt", "opt-350m": "opt", "bloom-560m": "bloom", "gpt2": "gpt2"}
    assert written["model_type"] == wanted.get(preset, "llama")


@pytest.mark.parametrize(
    ("preset", "sentence"),
    [
        ("glm-130b", "gpt2: embedding_norm would be False, not True"),
        ("palm-8b", "falcon: "),
        ("gpt3-small", "attention.windows"),
    ],
)
def test_a_model_no_family_computes_is_refused_with_the_obstacles(preset: str, sentence: str):
    with pytest.raises(UserError, match="no Hugging Face family computes this model") as caught:
        huggingface.write_config(presets.get(preset))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": None}, "has no 'model_type'"),
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type = 'longrope'"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True",
        ),
        ({"model_type": "falcon", "alibi": True}, "alibi = True"),
        ({"model_type": "gptj", "rotary_dim": NULL}, "rotary_dim: got null"),
        (
            {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
            "GPT computes False only",
        ),
        ({"model_type": "gpt_neox", "rotary_pct": 0.25}, "rotates 3 of 12 dimensions"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3}, "got 'chunked_attention'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "attention_factor": 2.0,
                }
            },
            "attention_factor = 2.0",
        ),
    ],
)
def test_settings_we_would_compute_otherwise_are_refused(changes: dict[str, Any], sentence: str):
    config = {**CASES["llama"][1], **CASES["gpt2"][1], "model_type": "llama", **changes}
    config = {key: None if value is NULL else value for key, value in config.items() if value is not None}
    with pytest.raises(UserError) as caught:
        huggingface.read_config(config)
    assert sentence in str(caught.value)


def test_older_configurations_say_the_same():
    new = transformers.AutoConfig.for_model(*CASES["llama3"][:1], **CASES["llama3"][1]).to_dict()
    rope = new.pop("rope_parameters")
    old = {
        **new,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": {**rope, "type": rope.pop("rope_type")},
    }
    assert huggingface.read_config(old) == huggingface.read_config({**old, **CASES["llama3"][1]})


def test_shards_are_written_and_read(tmp_path: Path):
    model = theirs("llama")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    ours = huggingface.from_hf(tmp_path / "theirs")
    huggingface.to_hf(ours, tmp_path / "ours", shard_bytes=20_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in ours.parameters())
    back = reload(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama"])
def test_checkpoints_without_head_and_pickled_ones_are_read(name: str, tmp_path: Path):
    model = theirs(name)
    state = dict(model.state_dict())
    if name != "llama":  # the published GPT-2 and BLOOM files lack the prefix, and GPT-2's has masks
        state = {key.removeprefix("transformer."): t for key, t in state.items() if key != "lm_head.weight"}
        state["h.0.attn.bias" if name == "gpt2" else "h.0.self_attention.attention.masked_bias"] = (
            torch.zeros(1)
        )
    model.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        wanted, got = model(tokens()).logits, huggingface.from_hf(tmp_path)(tokens())
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_part_of_a_model_that_sees(prefix: str, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    _, text = CASES["gemma3"]
    sees = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**sees, "image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(1)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = {
        name.replace("language_model.model.", prefix): tensor for name, tensor in load_file(file).items()
    }
    assert any(name.startswith(prefix) for name in stored) and "vision_tower.post_layernorm.bias" in stored
    save_file(stored, file, metadata={"format": "pt"})
    ours = huggingface.from_hf(tmp_path)
    with torch.no_grad():
        wanted, got = model(tokens()).logits, ours(tokens())
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    huggingface.to_hf(ours, tmp_path / "text", like=tmp_path)
    with torch.no_grad():
        assert (reload(tmp_path / "text")(tokens()).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_published_files_leave_the_language_parts_defaults_out():
    """Every key that Gemma 3 4B's file gives for its language part."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = huggingface.read_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    theirs = transformers.Gemma3TextConfig(
        **{key: value for key, value in text.items() if key != "model_type"}
    )
    assert config == huggingface.read_config(theirs.to_dict() | {"vocab_size": 262208})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.tied_head) == (8, 4, 256, True)


def _damaged(directory: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    weights = load_file(file)
    if damage == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif damage == "misshapen":
        weights["model.norm.weight"] = torch.zeros(47)
    elif damage == "left over":
        weights["model.layers.3.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(weights, file, metadata={"format": "pt"})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "no weights":
        file.unlink()
    elif damage == "bad json":
        (directory / "config.json").write_text("{")
    elif damage == "index without file":
        file.unlink()
        (directory / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-1.safetensors"}}'
        )


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("missing", "holds no 'model.layers.1.mlp.up_proj.weight'"),
        ("misshapen", "'model.norm.weight' has shape (47,), the configuration asks for (48,)"),
        ("left over", "holds 'model.layers.3.mlp.up_proj.weight' and 0 more that this configuration lacks"),
        ("truncated", "cannot be read"),
        ("no weights", "holds neither model.safetensors nor pytorch_model.bin"),
        ("bad json", "cannot be read"),
        ("index without file", "the index names this file, but it is not there"),
    ],
)
def test_damage_is_named(damage: str, sentence: str, tmp_path: Path):
    theirs("llama").save_pretrained(tmp_path)
    _damaged(tmp_path, damage)
    with pytest.raises(UserError) as caught:
        huggingface.from_hf(tmp_path)
    assert sentence in str(caught.value)


def test_what_is_nowhere_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="no directory at"):
        huggingface.from_hf(tmp_path / "absent")
    with pytest.raises(UserError, match="the hub does not give it"):
        huggingface.from_hf("nobody/nothing-of-this-name")


def test_tokenizer_and_token_ids_are_carried(tmp_path: Path):
    model = theirs("gpt2")
    model.config.eos_token_id = 5
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(b'{"odd":  "spacing"}\n')
    (tmp_path / "theirs" / "notes.txt").write_text("not a tokenizer's")
    huggingface.to_hf(huggingface.from_hf(tmp_path / "theirs"), tmp_path / "ours", like=tmp_path / "theirs")
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == b'{"odd":  "spacing"}\n'
    assert not (tmp_path / "ours" / "notes.txt").exists()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["eos_token_id"] == 5


def test_no_id_of_a_published_vocabulary_is_assumed(tmp_path: Path):
    config = presets.get(
        "gpt2", {"num_layers": 1, "width": 24, "vocab_size": 30, "attention": {"num_heads": 2}}
    )
    huggingface.to_hf(GPT(config), tmp_path)
    assert reload(tmp_path).config.eos_token_id is None


_PEAK = """
import resource, sys, torch
from gptcore.checkpoint import huggingface
import safetensors
huggingface.read_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 8})
import gptcore.models.gpt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = huggingface.from_hf(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(peak * 1024, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(
    resource.getpagesize() != 4096 or sys.platform != "linux", reason="reads Linux's ru_maxrss"
)
def test_loading_needs_the_model_and_a_tensor(tmp_path: Path):
    config = presets.get(
        "gpt2", {"num_layers": 12, "width": 512, "vocab_size": 8192, "attention": {"num_heads": 8}}
    )
    huggingface.to_hf(GPT(config), tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )  # fmt: skip
    peak, size, largest = map(int, ran.stdout.split())
    assert size > 150e6
    # the allocator's slack and what the first kernels load: 24 MiB
    assert peak <= size + largest + (24 << 20)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path):
    theirs("gpt2").save_pretrained(tmp_path / "theirs")
    model = huggingface.from_hf(tmp_path / "theirs")
    huggingface.to_hf(model, tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="file-size limit is reached; what was there before is unchanged"):
            huggingface.to_hf(model, tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before


def test_published_mixtral_is_the_preset():
    """Every key of Mixtral 8x7B's config.json that says what is computed."""
    published = {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    }  # fmt: skip
    config, preset = huggingface.read_config(published), presets.get("mixtral-8x7b")
    assert config.moe.merged({"renormalise": None}) == preset.moe.merged({"renormalise": None})
    written = huggingface.write_config(preset)
    assert written["model_type"] == "mixtral" and huggingface.read_config(written).moe == config.moe


@pytest.mark.parametrize(
    ("moe", "sentence"),
    [
        ({"capacity_factor": 1.25}, "mixtral: moe.eval_capacity_factor would be 0.0, not 1.25"),
        ({"every": 2}, "mixtral: mlp.hidden_size would be None"),
        ({"shared_experts": 1}, "mixtral: moe.shared_experts would be 0, not 1"),
        ({"top_k": 1}, "mixtral: moe.renormalise would be True, not False"),
        ({"noise": True}, "mixtral: moe.noise would be False, not True"),
    ],
)
def test_experts_that_mixtral_has_not_are_refused(moe: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as caught:
        huggingface.write_config(presets.get("mixtral-8x7b", {"moe": moe}))
    assert sentence in str(caught.value)


def test_what_only_training_looks_at_does_not_stand_in_the_way():
    moe = {"capacity_factor": 1.25, "eval_capacity_factor": 0.0, "dropout": 0.1, "second_choice": "gshard",
           "z_weight": 1e-3, "router_init_scale": 0.1}  # fmt: skip
    assert huggingface.write_config(presets.get("mixtral-8x7b", {"moe": moe}))["model_type"] == "mixtral"
