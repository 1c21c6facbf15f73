"""What one block keeps of activations, a token, by formula.

Each operation with what its autograd hook saves: a product its input, a norm its input and statistics, an activation
the product before it, attention q, k, v, its output and one log-sum-exp a query. e is the bytes of an element, 4 or 2.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from gptcore.models import accounting
from gptcore.models.config import GPTConfig

Checkpointing = Literal["none", "selective", "block"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "block")


class BlockActivations(NamedTuple):
    """Bytes a token of one block: its ``inputs``, the ``results`` of products and attention that their neighbours
    read in backward, those which none reads (``unread``), and what ``selective`` makes again (``remade``)."""

    inputs: int
    results: int
    unread: int
    remade: int
    has_input: bool  # whether plain backward reads the inputs themselves
    passed_on: int  # of ``unread``, what is one of the next block's inputs

    def kept(self, checkpointing: Checkpointing) -> int:
        """From forward to backward."""
        if checkpointing == "none":
            return self.results + self.remade + self.has_input * self.inputs
        if checkpointing == "block":
            return self.inputs
        return self.inputs + self.results + self.unread - self.passed_on

    def made_again(self, checkpointing: Checkpointing) -> int:
        """Beside that, while the block's backward runs."""
        if checkpointing == "none":
            return 0
        if checkpointing == "block":
            return self.remade + self.results
        return self.remade - self.unread  # which are forgotten then


def block_activations(config: GPTConfig, has_experts: bool, element_bytes: int) -> BlockActivations:
    """Of a block with a feed-forward, or with experts."""
    c, norm = config.width * element_bytes, config.norm
    layer = _experts(config, element_bytes) if has_experts else _feed_forward(config, element_bytes)
    results, unread, remade = _attention(config, element_bytes).beside(layer)
    remade += _norms(config, element_bytes)
    added_after = norm.placement in ("post", "deepnorm")
    if not added_after:
        remade += c  # attention's input; otherwise that is the block's own
    if norm.parallel == "shared":
        remade -= c  # and the feed-forward's
    if config.dropout:  # a factor for each element
        remade += (1 if norm.parallel != "none" else 2) * c
    sequential = norm.placement == "pre" and norm.parallel == "none"
    passed_on = c if sequential and not config.dropout and not has_experts else 0
    return BlockActivations(c if added_after else 2 * c, results, unread, remade, added_after, passed_on)


def lacking_inputs(config: GPTConfig, element_bytes: int) -> int:
    """Bytes a token that checkpointed blocks at the beginning have less of inputs: the first block's has one part,
    unless places are added to the tokens, and where norms are parallel the second's stream is the same tensor."""
    norm = config.norm
    if norm.placement in ("post", "deepnorm"):
        return 0
    if config.position.kind == "learned" and not config.embedding_norm and not config.dropout:
        return 0
    parts = 2 if norm.parallel != "none" and config.num_layers > 1 else 1
    return parts * config.width * element_bytes


def statistics_bytes(kind: str) -> int:
    """f32 a row: 1 / rms, or mean and 1 / deviation."""
    return 8 if kind == "layer_norm" else 4


def router_copy(config: GPTConfig, element_bytes: int) -> int:
    """The f32 copy of a bf16 router, in all of a layer of experts."""
    spec = config.moe
    if spec is None or element_bytes == 4:
        return 0
    return 4 * spec.num_experts * config.width * (1 + spec.noise)


class _Part(NamedTuple):
    """As of :class:`BlockActivations`."""

    results: int
    unread: int
    remade: int

    def beside(self, other: _Part) -> _Part:
        """Both together."""
        return _Part._make(map(sum, zip(self, other, strict=True)))


def _norms(config: GPTConfig, e: int) -> int:
    """Their inputs, of which parallel norms share one, and their statistics."""
    norms = accounting.norms_per_block(config)
    inputs = norms if config.norm.parallel == "none" else 1
    return inputs * config.width * e + norms * statistics_bytes(config.norm.kind)


def _attention(config: GPTConfig, e: int) -> _Part:
    """The fused projection (of which v is a view), the output with its lse; rotated or normed q and k are copies."""
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
    copied = (heads + kv_heads) * d * e
    remade, kind = 0, config.attention.qk_norm
    if kind != "none":
        remade += copied + (heads + kv_heads) * statistics_bytes(kind)
    if kind != "none" or config.position.kind == "rotary":
        remade += copied
    results = (heads + 2 * kv_heads) * d * e + heads * d * e + 4 * heads
    return _Part(results, config.width * e, remade)


def _feed_forward(config: GPTConfig, e: int, hidden: int | None = None) -> _Part:
    hidden = hidden or config.hidden_size
    up = 2 * hidden if config.mlp.gated else hidden
    return _Part(up * e, config.width * e, (config.width + hidden) * e)


def _experts(config: GPTConfig, e: int) -> _Part:
    """Router in f32, K rows a token sorted by expert, both products over them, the combination."""
    spec, c, f = config.moe, config.width, config.expert_hidden_size
    assert spec is not None
    k, up = spec.top_k, 2 * f if config.mlp.gated else f
    results = 4 * spec.num_experts * (1 + spec.noise) + k * (up + c) * e
    remade = 4 * (3 * k + 1)  # choices, places and gates; lse
    remade += k * (c + f) * e  # the rows and their activations
    if spec.jitter:  # the router's own input, and the factors that made it
        remade += 2 * 4 * c
    elif e == 2:
        remade += 4 * c
    if spec.noise:  # what was drawn, noisy logits
        remade += 4 * 2 * spec.num_experts
    if spec.balance == "shazeer":  # the odds of each expert to be chosen
        remade += 4 * (6 * spec.num_experts + 8 * k)
    if spec.dropout:  # a factor for each element
        remade += k * f * e
    part = _Part(results, 0, remade)
    if spec.shared_experts:
        return part.beside(_feed_forward(config, e, spec.shared_experts * f))
    # Otherwise only attention, or an f32 router, reads the layer's input itself.
    reads = config.norm.parallel == "shared" or (e == 4 and not spec.jitter)
    return part.beside(_Part(0, 0, c * e * reads))
