"""Small models of every family that is converted: odd sizes, grouped heads, biases and positions as each has them."""

from __future__ import annotations

from typing import Any

_LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 4}
_SIZES = {"hidden_size": 48, "vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0, **_LAYERS}
_LLAMA = {"intermediate_size": 72, "num_key_value_heads": 2, **_SIZES}
_GPT2 = {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 64, "vocab_size": 61}
_OPT = {"ffn_dim": 72, "dropout": 0.0, **_SIZES}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# name: (transformers' model_type, its settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2 | _NO_DROPOUT),
    "gpt2-own-head": ("gpt2", _GPT2 | {"tie_word_embeddings": False, "n_inner": 80, "scale_attn_weights": False}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", _OPT | {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "opt-no-final-norm": ("opt", _OPT | {"_remove_final_layer_norm": True, "enable_bias": False}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 6, "hidden_size": 48, "vocab_size": 61}),
    "gpt_neox": ("gpt_neox", {**_SIZES, "intermediate_size": 80, "hidden_size": 64}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {"intermediate_size": 80, **_SIZES, "use_parallel_residual": False, "rotary_pct": 0.5, "attention_bias": False},
    ),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 6}),
    "falcon": ("falcon", _SIZES),
    "falcon-40b": ("falcon", {**_SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-one-norm": (
        "falcon",
        {**_SIZES, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-sequential": ("falcon", {**_SIZES, "parallel_attn": False, "multi_query": False, "bias": True}),
    "llama": ("llama", _LLAMA),
    "llama-biases": ("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama-linear": (
        "llama", {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}
    ),
    "llama3": (
        "llama",
        {**_LLAMA, "tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }},
    ),
    "llama-yarn": (
        "llama",
        {**_LLAMA, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        }},
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 7, "head_dim": 16}),
    "mixtral": (
        "mixtral",
        {**_LLAMA, "num_key_value_heads": 1, "sliding_window": 7, "head_dim": 16, "num_local_experts": 5,
         "num_experts_per_tok": 2},
    ),
    "qwen2": (
        "qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {**_LLAMA, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 20,
         "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.3},
    ),
    "gemma3": (
        "gemma3_text",
        {**_LLAMA, "num_hidden_layers": 7, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 7,
         "query_pre_attn_scalar": 20, "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "glm": ("glm", {**_LLAMA, "head_dim": 12}),
    "glm4": ("glm4", {**_LLAMA, "head_dim": 12}),
}  # fmt: skip
