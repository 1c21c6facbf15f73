"""Parameters, FLOPs and bytes of a model by formula, without building it.

Formulas in the letters of ``config``; the tests hold the counts against published figures and against the
parameters that ``GPT`` really has.
"""

from __future__ import annotations

from typing import NamedTuple

from gptcore.models.config import GPTConfig


class ParameterCounts(NamedTuple):
    """Where the parameters are."""

    token_embedding: int
    position_embedding: int
    embedding_projection: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def without_embeddings(self) -> int:
        """N as Kaplan et al. count it: neither token nor position table, nor a head of its own."""
        return self.total - self.token_embedding - self.position_embedding - self.head


class StateBytes(NamedTuple):
    """Bytes that training keeps for the model, activations and workspace apart."""

    parameters: int
    gradients: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        return sum(self)


def parameter_counts(config: GPTConfig) -> ParameterCounts:
    """The number of parameters of each kind."""
    c, layers, f = config.width, config.num_layers, config.hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    spec = config.attention
    attention = c * (q + 2 * kv) + q * c + spec.qkv_bias * (q + 2 * kv) + spec.out_bias * c
    attention += spec.sinks * config.num_heads
    up = 2 * f if config.mlp.gated else f
    mlp = c * up + f * c + config.mlp.bias * (up + c)
    projected = config.table_width != c
    learned = config.position.kind == "learned"
    return ParameterCounts(
        token_embedding=config.vocab_size * config.table_width,
        position_embedding=(config.context_length + config.position.offset) * c if learned else 0,
        embedding_projection=2 * c * config.table_width if projected else 0,
        attention=layers * attention,
        mlp=layers * mlp,
        norms=_norm_parameters(config),
        head=0 if config.tied_head else config.vocab_size * (config.table_width + config.head_bias),
    )


def _norm_parameters(config: GPTConfig) -> int:
    vectors = 1 + config.norm.has_bias
    per_block = {"pre": 2, "post": 2, "deepnorm": 2, "sandwich": 4}[config.norm.placement]
    if config.norm.parallel == "shared":
        per_block = 1
    count = per_block * config.num_layers + config.norm.has_final
    norms = count * vectors * config.width + config.embedding_norm * vectors * config.width
    if config.attention.qk_norm != "none":
        qk_vectors = 1 + (config.attention.qk_norm == "layer_norm" and config.norm.has_bias)
        norms += 2 * qk_vectors * config.head_dim * config.num_layers
    return norms


def flops_per_token(config: GPTConfig, length: int, *, causal_halved: bool = False) -> int:
    """Model FLOPs of training on one token in a sequence of ``length``: 6N + 12·L·H·D·T (PaLM, appendix B).

    N is every parameter; recomputation does not count, and neither does what a band leaves out.
    ``causal_halved`` takes 6·L·H·D·T for the attention of causal models, whose queries see half the keys.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length
    if causal_halved and config.attention.causal:
        attention //= 2
    return 6 * parameter_counts(config).total + attention


def state_bytes(config: GPTConfig, *, parameter_bytes: int = 2) -> StateBytes:
    """Bytes of parameters, gradients and AdamW state: 16 a parameter, in f32 as in bf16 with f32 master."""
    n = parameter_counts(config).total
    master = 0 if parameter_bytes == 4 else 4 * n
    return StateBytes(parameter_bytes * n, parameter_bytes * n, master, 8 * n)


def kv_cache_bytes(config: GPTConfig, tokens: int, *, element_bytes: int = 2) -> int:
    """Bytes of keys and values for ``tokens`` cached tokens: 2·L·Hkv·D each."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes * tokens
