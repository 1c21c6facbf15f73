"""Parameters, FLOPs and bytes of a model by formula, without building it.

Formulas in the letters of ``config``; the tests hold the counts against published figures and against the
parameters that ``GPT`` really has.
"""

from __future__ import annotations

from typing import NamedTuple

from gptcore.models.config import GPTConfig


class ParameterCounts(NamedTuple):
    """Where the parameters are; ``mlp`` with all experts and their routers."""

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
    expert_layers = len(config.expert_layers)
    mlp = (layers - expert_layers) * _mlp_parameters(config, f) + expert_layers * _moe_parameters(config)
    projected = config.table_width != c
    learned = config.position.kind == "learned"
    return ParameterCounts(
        token_embedding=config.vocab_size * config.table_width,
        position_embedding=(config.context_length + config.position.offset) * c if learned else 0,
        embedding_projection=2 * c * config.table_width if projected else 0,
        attention=layers * attention,
        mlp=mlp,
        norms=_norm_parameters(config),
        head=0 if config.tied_head else config.vocab_size * (config.table_width + config.head_bias),
    )


def active_parameters(config: GPTConfig) -> int:
    """The parameters that one token meets: all but those of the E - K experts in each layer that it is not sent to."""
    total = parameter_counts(config).total
    if config.moe is None:
        return total
    idle = config.moe.num_experts - config.moe.top_k
    return total - len(config.expert_layers) * idle * _mlp_parameters(config, config.expert_hidden_size)


def _mlp_parameters(config: GPTConfig, hidden: int) -> int:
    """Of a feed-forward layer of this hidden size."""
    up = 2 * hidden if config.mlp.gated else hidden
    return config.width * (up + hidden) + config.mlp.bias * (up + config.width)


def _moe_parameters(config: GPTConfig) -> int:
    """Of a layer of experts, with its router."""
    spec, hidden = config.moe, config.expert_hidden_size
    if spec is None:
        return 0
    shared = _mlp_parameters(config, spec.shared_experts * hidden) if spec.shared_experts else 0
    router = config.width * spec.num_experts * (1 + spec.noise)
    return router + spec.num_experts * _mlp_parameters(config, hidden) + shared


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

    N is every parameter that a token meets (:func:`active_parameters`); recomputation does not count, and neither does
    what a band leaves out.
    ``causal_halved`` takes 6·L·H·D·T for the attention of causal models, whose queries see half the keys.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length
    if causal_halved and config.attention.causal:
        attention //= 2
    return 6 * active_parameters(config) + attention


def state_bytes(config: GPTConfig, *, parameter_bytes: int = 2) -> StateBytes:
    """Bytes of parameters, gradients and AdamW state: 16 a parameter, in f32 as in bf16 with f32 master."""
    n = parameter_counts(config).total
    master = 0 if parameter_bytes == 4 else 4 * n
    return StateBytes(parameter_bytes * n, parameter_bytes * n, master, 8 * n)


def kv_cache_bytes(config: GPTConfig, tokens: int, *, element_bytes: int = 2) -> int:
    """Bytes of keys and values for ``tokens`` cached tokens: 2·L·Hkv·D each."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes * tokens
