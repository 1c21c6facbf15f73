"""Parameters, FLOPs and bytes of a model by formula, without building it.

Formulas in the letters of ``config``; the tests hold the counts against published figures and against the
parameters that ``GPT`` really has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from gptcore.models.config import GPTConfig

Shape = tuple[int, ...]


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


def parameter_shapes(config: GPTConfig) -> Counter[Shape]:
    """How many parameter tensors of each shape ``GPT`` has: :func:`root_shapes` and those of every block."""
    shapes = Counter(root_shapes(config))
    experts = len(config.expert_layers)
    for has_experts, copies in ((False, config.num_layers - experts), (True, experts)):
        if copies:
            for shape in block_shapes(config, has_experts):
                shapes[shape] += copies
    return shapes


def root_shapes(config: GPTConfig) -> list[Shape]:
    """The parameter tensors outside the blocks: tables, projections beside them, norms, a head of its own."""
    c, table = config.width, config.table_width
    shapes: list[Shape] = [(config.vocab_size, table)]
    if config.position.kind == "learned":
        shapes.append((config.context_length + config.position.offset, c))
    if table != c:
        shapes += [(c, table), (table, c)]
    norms = config.embedding_norm + config.norm.has_final
    shapes += [(c,)] * (norms * (1 + config.norm.has_bias))
    if not config.tied_head:
        shapes += [(config.vocab_size, table)] + [(config.vocab_size,)] * config.head_bias
    return shapes


def block_shapes(config: GPTConfig, has_experts: bool) -> list[Shape]:
    """The parameter tensors of a block, with a feed-forward or with experts in its place."""
    c, spec, d = config.width, config.attention, config.head_dim
    q, qkv = config.num_heads * d, (config.num_heads + 2 * config.num_kv_heads) * d
    shapes: list[Shape] = [(qkv, c), (c, q)]
    shapes += [(qkv,)] * spec.qkv_bias + [(c,)] * spec.out_bias + [(config.num_heads,)] * spec.sinks
    shapes += [(c,)] * (norms_per_block(config) * (1 + config.norm.has_bias))
    if spec.qk_norm != "none":
        shapes += [(d,)] * (2 * _qk_norm_vectors(config))
    return shapes + (_moe_shapes(config) if has_experts else _mlp_shapes(config, config.hidden_size))


def _mlp_shapes(config: GPTConfig, hidden: int, experts: Shape = ()) -> list[Shape]:
    """Both projections and their biases, stacked over ``experts``."""
    c, up = config.width, 2 * hidden if config.mlp.gated else hidden
    shapes: list[Shape] = [(*experts, up, c), (*experts, c, hidden)]
    return shapes + ([(*experts, up), (*experts, c)] if config.mlp.bias else [])


def _moe_shapes(config: GPTConfig) -> list[Shape]:
    spec, hidden = config.moe, config.expert_hidden_size
    assert spec is not None
    router: Shape = (spec.num_experts, config.width)
    shapes = [router] * (1 + spec.noise)
    shapes += _mlp_shapes(config, hidden, (spec.num_experts,))
    return shapes + (_mlp_shapes(config, spec.shared_experts * hidden) if spec.shared_experts else [])


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
    count = norms_per_block(config) * config.num_layers + config.norm.has_final
    norms = count * vectors * config.width + config.embedding_norm * vectors * config.width
    if config.attention.qk_norm != "none":
        norms += 2 * _qk_norm_vectors(config) * config.head_dim * config.num_layers
    return norms


def norms_per_block(config: GPTConfig) -> int:
    """Norms of the residual stream in a block, those of queries and keys apart."""
    if config.norm.parallel == "shared":
        return 1
    return 4 if config.norm.placement == "sandwich" else 2


def _qk_norm_vectors(config: GPTConfig) -> int:
    """Of each of the two norms of queries and keys."""
    return 1 + (config.attention.qk_norm == "layer_norm" and config.norm.has_bias)


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


def remade_flops_per_token(config: GPTConfig, length: int, layers: Iterable[int]) -> int:
    """FLOPs, for one token, of a second forward pass of these blocks: 2N + 4·H·D·T each."""
    attention = 4 * config.num_heads * config.head_dim * length
    met = [_met_in_block(config, config.has_experts(layer)) for layer in layers]
    return sum(2 * n + attention for n in met)


def _met_in_block(config: GPTConfig, has_experts: bool) -> int:
    """Parameters of a block that a token meets."""
    total = sum(math.prod(shape) for shape in block_shapes(config, has_experts))
    if not has_experts or config.moe is None:
        return total
    idle = config.moe.num_experts - config.moe.top_k
    return total - idle * _mlp_parameters(config, config.expert_hidden_size)


def state_bytes(config: GPTConfig, *, parameter_bytes: int = 2) -> StateBytes:
    """Bytes of parameters, gradients and AdamW state: 16 a parameter, in f32 as in bf16 with f32 master."""
    n = parameter_counts(config).total
    master = 0 if parameter_bytes == 4 else 4 * n
    return StateBytes(parameter_bytes * n, parameter_bytes * n, master, 8 * n)


def kv_cache_bytes(config: GPTConfig, tokens: int, *, element_bytes: int = 2) -> int:
    """Bytes of keys and values for ``tokens`` cached tokens: 2·L·Hkv·D each."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes * tokens
