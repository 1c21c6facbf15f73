"""``config.json`` of GPT-2, OPT, BLOOM, GPT-NeoX, GPT-J and Falcon: a reader and a writer each."""

from __future__ import annotations

from typing import Any

from gptcore.checkpoint.huggingface import rotary
from gptcore.checkpoint.huggingface.settings import Config, activation, dropout_of, refuse, their_activation
from gptcore.errors import UserError
from gptcore.models import AttentionSpec, GPTConfig, MlpSpec, NormSpec, PositionSpec


def read_gpt2(hf: Config) -> GPTConfig:
    refuse(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    dropout, attention_dropout = dropout_of(
        {"resid_pdrop": 0.1, "attn_pdrop": 0.1} | hf, "resid_pdrop", "attn_pdrop"
    )
    refuse(hf, embd_pdrop=hf.get("resid_pdrop", 0.1))
    return GPTConfig(
        num_layers=hf["n_layer"], width=hf["n_embd"], vocab_size=hf["vocab_size"],
        context_length=hf.get("n_positions", 1024), dropout=dropout,
        attention=AttentionSpec(
            num_heads=hf["n_head"], dropout=attention_dropout,
            softmax_scale=None if hf.get("scale_attn_weights", True) else 1.0,
        ),
        norm=NormSpec(eps=hf.get("layer_norm_epsilon", 1e-5)),
        mlp=MlpSpec(
            hidden_size=hf.get("n_inner"), activation=activation(hf, "activation_function", "gelu_new"),
        ),
        tied_head=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def write_gpt2(config: GPTConfig) -> Config:
    return {
        "vocab_size": config.vocab_size, "n_positions": config.context_length, "n_ctx": config.context_length,
        "n_embd": config.width, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_inner": config.mlp.hidden_size, "activation_function": their_activation(config.mlp.activation),
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.attention.dropout,
        "layer_norm_epsilon": config.norm.eps, "scale_attn_weights": config.attention.softmax_scale != 1.0,
        "tie_word_embeddings": config.tied_head,
    }  # fmt: skip


def read_opt(hf: Config) -> GPTConfig:
    refuse(hf, layer_norm_elementwise_affine=True, layerdrop=0.0)
    before, width, bias = hf.get("do_layer_norm_before", True), hf["hidden_size"], hf.get("enable_bias", True)
    dropout, attention_dropout = dropout_of({"dropout": 0.1} | hf, "dropout", "attention_dropout")
    table = hf.get("word_embed_proj_dim") or width
    return GPTConfig(
        num_layers=hf["num_hidden_layers"], width=width, vocab_size=hf["vocab_size"],
        context_length=hf.get("max_position_embeddings", 2048), dropout=dropout,
        embedding_width=None if table == width else table,
        attention=AttentionSpec(
            num_heads=hf["num_attention_heads"], dropout=attention_dropout, qkv_bias=bias, out_bias=bias
        ),
        norm=NormSpec(
            placement="pre" if before else "post", final=before and not hf.get("_remove_final_layer_norm", False)
        ),
        mlp=MlpSpec(
            hidden_size=hf["ffn_dim"], bias=bias, activation=activation(hf, "activation_function", "relu")
        ),
        position=PositionSpec(offset=2),
        tied_head=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def write_opt(config: GPTConfig) -> Config:
    before = config.norm.placement == "pre"
    return {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
        "hidden_size": config.width, "word_embed_proj_dim": config.table_width,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "ffn_dim": config.hidden_size, "activation_function": their_activation(config.mlp.activation),
        "do_layer_norm_before": before, "_remove_final_layer_norm": before and not config.norm.has_final,
        "enable_bias": config.mlp.bias, "dropout": config.dropout,
        "attention_dropout": config.attention.dropout, "tie_word_embeddings": config.tied_head,
    }  # fmt: skip


def read_bloom(hf: Config) -> GPTConfig:
    refuse(hf, apply_residual_connection_post_layernorm=False)
    dropout, attention_dropout = dropout_of(hf, "hidden_dropout", "attention_dropout")
    return GPTConfig(
        num_layers=hf["n_layer"], width=hf.get("hidden_size") or hf["n_embed"], vocab_size=hf["vocab_size"],
        context_length=hf.get("seq_length", 2048), dropout=dropout,
        attention=AttentionSpec(num_heads=hf.get("n_head") or hf["num_attention_heads"], dropout=attention_dropout),
        norm=NormSpec(eps=hf.get("layer_norm_epsilon", 1e-5)),
        position=PositionSpec(kind="alibi"),
        embedding_norm=True, tied_head=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def write_bloom(config: GPTConfig) -> Config:
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "n_layer": config.num_layers,
        "n_head": config.num_heads, "seq_length": config.context_length,
        "layer_norm_epsilon": config.norm.eps, "hidden_dropout": config.dropout,
        "attention_dropout": config.attention.dropout, "tie_word_embeddings": config.tied_head,
    }  # fmt: skip


def read_gpt_neox(hf: Config) -> GPTConfig:
    dropout, attention_dropout = dropout_of(hf, "hidden_dropout", "attention_dropout")
    bias = hf.get("attention_bias", True)
    return GPTConfig(
        num_layers=hf["num_hidden_layers"], width=hf["hidden_size"], vocab_size=hf["vocab_size"],
        context_length=hf["max_position_embeddings"], dropout=dropout,
        attention=AttentionSpec(
            num_heads=hf["num_attention_heads"], dropout=attention_dropout, qkv_bias=bias, out_bias=bias
        ),
        norm=NormSpec(
            eps=hf.get("layer_norm_eps", 1e-5),
            parallel="separate" if hf.get("use_parallel_residual", True) else "none",
        ),
        mlp=MlpSpec(hidden_size=hf["intermediate_size"], activation=activation(hf, "hidden_act", "gelu")),
        position=rotary.read(hf, theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25),
        tied_head=hf.get("tie_word_embeddings", False),
    )  # fmt: skip


def write_gpt_neox(config: GPTConfig) -> Config:
    return {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
        "hidden_size": config.width, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.hidden_size,
        "hidden_act": their_activation(config.mlp.activation), "layer_norm_eps": config.norm.eps,
        "attention_bias": config.attention.qkv_bias, "use_parallel_residual": config.norm.parallel != "none",
        "hidden_dropout": config.dropout, "attention_dropout": config.attention.dropout,
        "tie_word_embeddings": config.tied_head, **rotary.write(config),
    }  # fmt: skip


def read_gptj(hf: Config) -> GPTConfig:
    dropout, attention_dropout = dropout_of(hf, "resid_pdrop", "attn_pdrop")
    refuse(hf, embd_pdrop=hf.get("resid_pdrop", 0.0))
    if hf.get("rotary_dim", 64) is None:
        raise UserError(
            "config.json: rotary_dim: got null, expected how many dimensions of a head are rotated"
        )
    return GPTConfig(
        num_layers=hf["n_layer"], width=hf["n_embd"], vocab_size=hf["vocab_size"],
        context_length=hf.get("n_positions", 2048), dropout=dropout,
        attention=AttentionSpec(
            num_heads=hf["n_head"], dropout=attention_dropout, qkv_bias=False, out_bias=False
        ),
        norm=NormSpec(eps=hf.get("layer_norm_epsilon", 1e-5), parallel="shared"),
        mlp=MlpSpec(
            hidden_size=hf.get("n_inner"), activation=activation(hf, "activation_function", "gelu_new")
        ),
        position=PositionSpec(kind="rotary", rotary_dim=hf.get("rotary_dim", 64), interleaved=True),
        tied_head=hf.get("tie_word_embeddings", False), head_bias=True,
    )  # fmt: skip


def write_gptj(config: GPTConfig) -> Config:
    return {
        "vocab_size": config.vocab_size, "n_positions": config.context_length, "n_embd": config.width,
        "n_layer": config.num_layers, "n_head": config.num_heads, "n_inner": config.mlp.hidden_size,
        "rotary_dim": config.rotary_dim, "activation_function": their_activation(config.mlp.activation),
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.attention.dropout,
        "layer_norm_epsilon": config.norm.eps, "tie_word_embeddings": config.tied_head,
    }  # fmt: skip


def read_falcon(hf: Config) -> GPTConfig:
    if hf.get("alibi"):
        raise UserError(
            "config.json: alibi = True: transformers rounds Falcon's bias to bfloat16, GPT does not; "
            "expected a rotary Falcon"
        )
    new, heads, bias = (
        hf.get("new_decoder_architecture", False),
        hf["num_attention_heads"],
        hf.get("bias", False),
    )
    parallel: Any = "none"
    if new or hf.get("parallel_attn", True):
        norms = hf.get("num_ln_in_parallel_attn") or (2 if new else 1)
        parallel = "separate" if new and norms == 2 else "shared"
    kv_heads = hf.get("num_kv_heads") or heads if new else 1 if hf.get("multi_query", True) else heads
    dropout, attention_dropout = dropout_of(hf, "hidden_dropout", "attention_dropout")
    return GPTConfig(
        num_layers=hf["num_hidden_layers"], width=hf["hidden_size"], vocab_size=hf["vocab_size"],
        context_length=hf.get("max_position_embeddings", 2048), dropout=dropout,
        attention=AttentionSpec(
            num_heads=heads, num_kv_heads=kv_heads, dropout=attention_dropout, qkv_bias=bias, out_bias=bias
        ),
        norm=NormSpec(eps=hf.get("layer_norm_epsilon", 1e-5), parallel=parallel),
        mlp=MlpSpec(
            hidden_size=hf.get("ffn_hidden_size"), bias=bias, activation=activation(hf, "activation", "gelu")
        ),
        position=rotary.read(hf),
        tied_head=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def write_falcon(config: GPTConfig) -> Config:
    grouped = config.num_kv_heads not in (1, config.num_heads)
    new = grouped or config.norm.parallel == "separate"
    return {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
        "hidden_size": config.width, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_kv_heads": config.num_kv_heads,
        "ffn_hidden_size": config.hidden_size, "activation": their_activation(config.mlp.activation),
        "new_decoder_architecture": new, "multi_query": config.num_kv_heads == 1,
        "parallel_attn": config.norm.parallel != "none", "alibi": False, "bias": config.mlp.bias,
        "num_ln_in_parallel_attn": 2 if config.norm.parallel == "separate" else 1,
        "layer_norm_epsilon": config.norm.eps, "hidden_dropout": config.dropout,
        "attention_dropout": config.attention.dropout, "tie_word_embeddings": config.tied_head,
        **rotary.write(config),
    }  # fmt: skip
