"""``config.json`` of LLaMA and what grew from it (Mistral, Mixtral, Qwen, Gemma, GLM): a reader and a writer each."""

from __future__ import annotations

from typing import Any

from gptcore.checkpoint.huggingface import rotary
from gptcore.checkpoint.huggingface.settings import Config, gated, refuse, their_activation
from gptcore.errors import UserError
from gptcore.models import AttentionSpec, GPTConfig, MlpSpec, MoESpec, NormSpec


def _pattern(hf: Config) -> tuple[Any, int]:
    """Which layers see a window, and the window."""
    layers = hf.get("layer_types")
    if layers is None:
        return ("dense",), 256
    known = {"full_attention": "dense", "sliding_attention": "banded"}
    strange = next((kind for kind in layers if kind not in known), None)
    if strange is not None:
        raise UserError(f"config.json: layer_types: got {strange!r}, expected one of {', '.join(known)}")
    return tuple(known[kind] for kind in layers), hf.get("sliding_window") or 256


def _layer_types(config: GPTConfig) -> list[str]:
    dense = (config.window_size(layer)[0] < 0 for layer in range(config.num_layers))
    return ["full_attention" if full else "sliding_attention" for full in dense]


def read_llama_like(hf: Config, **changes: Any) -> GPTConfig:
    """What LLaMA, Mistral, Qwen, Gemma and GLM have in common; ``changes`` are laid over it."""
    heads, bias = hf["num_attention_heads"], hf.get("attention_bias", False)
    pattern, window = _pattern(hf)
    config = GPTConfig(
        num_layers=hf["num_hidden_layers"], width=hf["hidden_size"], vocab_size=hf["vocab_size"],
        context_length=hf["max_position_embeddings"],
        attention=AttentionSpec(
            num_heads=heads, num_kv_heads=hf.get("num_key_value_heads") or heads, head_dim=hf.get("head_dim"),
            pattern=pattern, window=window, qkv_bias=bias, out_bias=bias,
            dropout=float(hf.get("attention_dropout") or 0.0),
        ),
        norm=NormSpec(kind="rms_norm", eps=hf.get("rms_norm_eps", 1e-6)),
        mlp=MlpSpec(
            hidden_size=hf["intermediate_size"], activation=gated(hf, "hidden_act", "silu"), bias=False
        ),
        position=changes.pop("position", None) or rotary.read(hf),
        tied_head=hf.get("tie_word_embeddings", False),
    )  # fmt: skip
    return config.merged(changes)


def write_llama_like(config: GPTConfig, **more: Any) -> Config:
    return {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
        "hidden_size": config.width, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "intermediate_size": config.hidden_size,
        "hidden_act": their_activation(config.mlp.activation, tanh="gelu_pytorch_tanh"),
        "rms_norm_eps": config.norm.eps, "attention_dropout": config.attention.dropout,
        "tie_word_embeddings": config.tied_head,
        **rotary.write(config), **more,
    }  # fmt: skip


def _without(hf: Config, *keys: str) -> Config:
    """``hf`` without keys that the family's code does not look at."""
    return {key: value for key, value in hf.items() if key not in keys}


def read_llama(hf: Config) -> GPTConfig:
    return read_llama_like(_without(hf, "layer_types"), mlp={"bias": hf.get("mlp_bias", False)})


def write_llama(config: GPTConfig) -> Config:
    bias = config.attention.qkv_bias
    return write_llama_like(config, attention_bias=bias, mlp_bias=config.mlp.bias)


def read_mistral(hf: Config) -> GPTConfig:
    window = hf.get("sliding_window", 4096)
    kinds = None if window is None else ["sliding_attention"]
    hf = {"num_key_value_heads": 8} | _without(hf, "attention_bias")
    return read_llama_like(hf | {"layer_types": kinds, "sliding_window": window})


def write_mistral(config: GPTConfig) -> Config:
    banded = config.window_size(0)[0] >= 0
    return write_llama_like(config, sliding_window=config.attention.window if banded else None)


def read_mixtral(hf: Config) -> GPTConfig:
    """Its jitter multiplies what the experts read too, ours what the router reads; both are for training only."""
    if not hf.get("rope_parameters"):
        hf = {"rope_theta": 1e6} | hf
    config = read_mistral({"sliding_window": None, "rms_norm_eps": 1e-5} | hf)
    moe = {
        "num_experts": hf.get("num_local_experts", 8), "top_k": hf.get("num_experts_per_tok", 2),
        "renormalise": True, "balance": "all", "balance_weight": float(hf.get("router_aux_loss_coef", 1e-3)),
        "z_weight": 0.0, "jitter": float(hf.get("router_jitter_noise") or 0.0),
    }  # fmt: skip
    return config.merged({"moe": moe})


def write_mixtral(config: GPTConfig) -> Config:
    moe = config.moe or MoESpec()
    return write_mistral(config) | {
        "intermediate_size": config.expert_hidden_size, "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.balance_weight,
        "router_jitter_noise": moe.jitter,
    }  # fmt: skip


def _qwen_layers(hf: Config) -> Config:
    """Qwen's configuration with the kind of every layer spelt out."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    dense = hf.get("max_window_layers", 28) if window is not None else hf["num_hidden_layers"]
    kinds = hf.get("layer_types") or [
        "full_attention" if layer < dense else "sliding_attention" for layer in range(hf["num_hidden_layers"])
    ]
    return hf | {"layer_types": kinds, "sliding_window": window}


def write_qwen2(config: GPTConfig) -> Config:
    kinds = _layer_types(config)
    banded = "sliding_attention" in kinds
    return write_llama_like(
        config, layer_types=kinds, use_sliding_window=banded, max_window_layers=0,
        sliding_window=config.attention.window if banded else None,
    )  # fmt: skip


def read_qwen2(hf: Config) -> GPTConfig:
    hf = _qwen_layers(_without(hf, "attention_bias"))
    return read_llama_like(hf, attention={"qkv_bias": True})


def read_qwen3(hf: Config) -> GPTConfig:
    return read_llama_like({"head_dim": 128} | _qwen_layers(hf), attention={"qk_norm": "rms_norm"})


def write_qwen3(config: GPTConfig) -> Config:
    return write_qwen2(config) | {"attention_bias": config.attention.qkv_bias}


def _gemma_changes(hf: Config) -> dict[str, Any]:
    """What sets Gemma 2 and 3 apart from LLaMA."""
    refuse(hf, use_bidirectional_attention=False)
    return {
        "attention": {
            "softmax_scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
            "soft_cap": hf.get("attn_logit_softcapping"),
        },
        "norm": {"placement": "sandwich", "zero_centred": True},
        "embedding_scale": float(hf["hidden_size"]) ** 0.5,
        "logit_soft_cap": hf.get("final_logit_softcapping"),
    }


def _gemma_defaults(hf: Config, dense_every: int) -> Config:
    kinds = [
        "sliding_attention" if (layer + 1) % dense_every else "full_attention"
        for layer in range(hf["num_hidden_layers"])
    ]
    return {
        "head_dim": 256, "layer_types": kinds, "sliding_window": 4096, "tie_word_embeddings": True,
        "hidden_act": hf.get("hidden_activation") or "gelu_pytorch_tanh",
    }  # fmt: skip


def read_gemma2(hf: Config) -> GPTConfig:
    hf = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | hf
    given = {key: value for key, value in hf.items() if key != "hidden_act" and value is not None}
    return read_llama_like(_gemma_defaults(hf, 2) | given, **_gemma_changes(hf))


def read_gemma3(hf: Config) -> GPTConfig:
    defaults = _gemma_defaults(hf, hf.get("sliding_window_pattern", 6))
    hf = defaults | {key: value for key, value in hf.items() if key != "hidden_act" and value is not None}
    changes = _gemma_changes(hf)
    changes["attention"]["qk_norm"] = "rms_norm"
    return read_llama_like(hf, position=rotary.read_by_layer(hf), **changes)


def write_gemma(config: GPTConfig) -> Config:
    written = write_llama_like(config)
    written["hidden_activation"] = written.pop("hidden_act")
    scale = config.attention.softmax_scale or config.head_dim**-0.5
    return written | {
        "layer_types": _layer_types(config), "sliding_window": config.attention.window,
        "query_pre_attn_scalar": round(scale**-2), "attn_logit_softcapping": config.attention.soft_cap,
        "final_logit_softcapping": config.logit_soft_cap, "attention_bias": config.attention.qkv_bias,
    }  # fmt: skip


def write_gemma3(config: GPTConfig) -> Config:
    return write_gemma(config) | rotary.write_by_layer(config, _layer_types(config))


def read_glm(hf: Config, **changes: Any) -> GPTConfig:
    position = rotary.read(hf, fraction=0.5, interleaved=True)
    hf = {"attention_bias": True, "num_key_value_heads": 2, "head_dim": 128} | hf
    attention = {"out_bias": False}
    return read_llama_like(hf, position=position, attention=attention, **changes)


def read_glm4(hf: Config) -> GPTConfig:
    return read_glm(hf, norm={"placement": "sandwich"})


def write_glm(config: GPTConfig) -> Config:
    return write_llama_like(config, attention_bias=config.attention.qkv_bias)
