"""What a training step keeps of activations, by formula, without building the model.

Bytes that ``GPT`` leaves for its backward pass as its code is, each operation with what its autograd hook saves. A
product keeps its input, a norm its input and statistics, an activation the product before it, attention q, k, v, its
output and one log-sum-exp a query; the fused loss keeps no logits, so nothing grows with T² or with V times tokens.
Of that, three amounts are kept (``checkpointing``):

``none``: everything.
``selective``: of each block its input and the results of products and attention; norms, rotations and activations are
    made again in backward.
``block``: of each block its input, the residual stream as (stream, delta); all else is made again, at the cost of a
    second forward pass of the blocks.

The letters are those of ``config``; e is the bytes of an element, 4 or 2. The tests hold all of it against what torch
saves and allocates.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from gptcore.models import accounting
from gptcore.models.config import GPTConfig

Checkpointing = Literal["none", "selective", "block"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "block")

# What ops/linear_cross_entropy.py and its contract say: tokens of a chunk, words of a stretch of the vocabulary.
_CHUNK_ROWS = 512
_MOST_WORDS, _LEAST_WORDS, _STRETCHES = 1024, 256, 32


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


class Moment(NamedTuple):
    """A moment of a backward pass: bytes of activations and of their gradients, and the ``parameters`` whose gradients
    have been made by then."""

    name: str
    bytes: int
    parameters: int


class Activations(NamedTuple):
    """Bytes of one forward and backward pass over some tokens.

    ``blocks`` and ``ends`` (embedding, final norm, loss) are kept from forward to backward; ``again`` is the most that
    one block makes anew. ``moments`` are those at which memory may be fullest: it falls by what a block kept and rises
    by its weights' gradients from block to block, so at one of both ends. ``workspace`` is the loss kernel's scratch.
    """

    blocks: int
    ends: int
    again: int
    moments: tuple[Moment, ...]
    workspace: int

    @property
    def kept(self) -> int:
        return self.blocks + self.ends


def activations(
    config: GPTConfig, tokens: int, *, element_bytes: int = 2, checkpointing: Checkpointing = "none"
) -> Activations:
    """Of a pass over ``tokens`` tokens, all rows together, in f32 (``element_bytes`` 4) or bf16 (2).

    Raises:
        ValueError: no tokens, another element size or checkpointing.
    """
    if tokens < 1 or element_bytes not in (2, 4) or checkpointing not in CHECKPOINTING:
        raise ValueError(
            f"activations: got {tokens} tokens, element_bytes {element_bytes}, checkpointing '{checkpointing}', "
            f"expected 1 or more, 2 or 4, one of {', '.join(CHECKPOINTING)}"
        )
    kinds = {
        has_experts: block_activations(config, has_experts, element_bytes)
        for has_experts in sorted({config.has_experts(layer) for layer in range(config.num_layers)})
    }
    layers = {True: len(config.expert_layers), False: config.num_layers - len(config.expert_layers)}
    kept = sum(layers[kind] * block.kept(checkpointing) for kind, block in kinds.items())
    blocks = tokens * kept
    if checkpointing == "none":
        blocks += layers[True] * _router_copy(config, element_bytes)
    else:
        blocks -= tokens * _not_in_first(config, element_bytes, checkpointing)
    at_once = gradients_at_once(tokens, element_bytes)
    again = tokens * max(block.made_again(checkpointing) for block in kinds.values())
    ends = tokens * _ends(config, element_bytes, at_once)
    moments = _moments(config, tokens, element_bytes, kinds, blocks + ends, again, checkpointing)
    return Activations(blocks, ends, again, moments, _loss_workspace(config, tokens, element_bytes, at_once))


def gradients_at_once(tokens: int, element_bytes: int) -> bool:
    """Whether the loss makes its gradients in forward: see ``ops/linear_cross_entropy.py``."""
    return element_bytes == 4 or tokens <= _CHUNK_ROWS


def _moments(
    config: GPTConfig,
    tokens: int,
    e: int,
    kinds: dict[bool, BlockActivations],
    kept: int,
    again: int,
    checkpointing: Checkpointing,
) -> tuple[Moment, ...]:
    """In the loss; in the last feed-forward; in the first, or the first layer of experts, whose weights are many,
    before and after its first product; at the end."""
    at_once = gradients_at_once(tokens, e)
    head = config.vocab_size * config.table_width
    freed = config.table_width * (1 + at_once) + config.width * config.norm.has_final
    freed += config.width * (config.table_width != config.width)
    last = _FeedForward.of(config, config.num_layers - 1)
    layer = config.expert_layers[0] if config.expert_layers else 0
    first = _FeedForward.of(config, layer)
    block = kinds[config.has_experts(layer)]
    there = block.results + block.remade + block.inputs + layer * kinds.get(False, block).kept(checkpointing)
    # whose gradients backward has not made by then: blocks before and half of this, tables that are not the head
    before = sum(
        math.prod(shape)
        for i in range(layer)
        for shape in accounting.block_shapes(config, config.has_experts(i))
    )
    before += sum(map(math.prod, accounting.block_shapes(config, config.has_experts(layer))))
    before += sum(map(math.prod, accounting.root_shapes(config))) - head
    total = accounting.parameter_counts(config).total
    at_end = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + 2 * config.width
    return (
        Moment("loss", kept + (0 if at_once else tokens * config.table_width * e), head),
        Moment("last block", kept + again + tokens * (last.inside - freed) * e, head + last.down),
        Moment("first block", tokens * (there + first.inside * e), total - before + first.down),
        Moment("its weights", tokens * (there + first.after * e), total - before + first.down + first.up),
        Moment("end", tokens * at_end * e, total),
    )


class _FeedForward(NamedTuple):
    """Elements of gradient a token inside a feed-forward, over what forward kept of it: before its first product
    (``inside``: that of the stream, of the activation's input, and its output's in place of the activation) and
    ``after`` it (that of its input more, while the activation and its input are gone); its weights."""

    inside: int
    after: int
    up: int
    down: int

    @classmethod
    def of(cls, config: GPTConfig, layer: int) -> _FeedForward:
        spec = config.moe if config.has_experts(layer) else None
        hidden = config.expert_hidden_size if spec else config.hidden_size
        rows, experts = (spec.top_k, spec.num_experts) if spec else (1, 1)
        up = rows * hidden * (1 + config.mlp.gated)
        stream = config.width * (
            1 - rows if spec else 1
        )  # experts' rows are gone when those of their gradients come
        after = config.width * (1 + rows) - rows * hidden
        weight = experts * hidden * config.width
        return cls(stream + up, after, weight * (1 + config.mlp.gated), weight)


def block_activations(config: GPTConfig, has_experts: bool, element_bytes: int) -> BlockActivations:
    """Of a block with a feed-forward, or with experts."""
    c = config.width * element_bytes
    added_after = config.norm.placement in ("post", "deepnorm")
    layer = _experts(config, element_bytes) if has_experts else _feed_forward(config, element_bytes)
    results, unread, remade = (
        sum(column) for column in zip(_attention(config, element_bytes), layer, strict=True)
    )
    remade += _norms(config, element_bytes)
    if not added_after:
        remade += c  # attention's input; otherwise that is the block's own
    if config.norm.parallel == "shared":
        remade -= c  # and the feed-forward's
    if config.dropout:  # a factor for each element
        remade += (1 if config.norm.parallel != "none" else 2) * c
    sequential = config.norm.placement == "pre" and config.norm.parallel == "none"
    passed_on = c if sequential and not config.dropout and not has_experts else 0
    return BlockActivations(c if added_after else 2 * c, results, unread, remade, added_after, passed_on)


def _not_in_first(config: GPTConfig, e: int, checkpointing: Checkpointing) -> int:
    """What the first blocks lack of the inputs: the first has one part, unless places are added to the tokens, and
    where norms are parallel the second's stream is the same tensor; the last passes nothing on."""
    c, norm = config.width * e, config.norm
    if norm.placement in ("post", "deepnorm"):
        return 0
    added = config.position.kind == "learned" and not config.embedding_norm and not config.dropout
    lacking = 0 if added else (2 if norm.parallel != "none" and config.num_layers > 1 else 1)
    first = block_activations(config, config.has_experts(0), e)
    return lacking * c - (first.passed_on if checkpointing == "selective" else 0)


def _norms(config: GPTConfig, e: int) -> int:
    """Their inputs, of which parallel norms share one, and their statistics."""
    norms = accounting.norms_per_block(config)
    inputs = norms if config.norm.parallel == "none" else 1
    return inputs * config.width * e + norms * _statistics_bytes(config.norm.kind)


Part = tuple[int, int, int]  # results, unread, remade


def _attention(config: GPTConfig, e: int) -> Part:
    """The fused projection (of which v is a view), the output with its lse; rotated or normed q and k are copies."""
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
    copied = (heads + kv_heads) * d * e
    remade, kind = 0, config.attention.qk_norm
    if kind != "none":
        remade += copied + (heads + kv_heads) * _statistics_bytes(kind)
    if kind != "none" or config.position.kind == "rotary":
        remade += copied
    results = (heads + 2 * kv_heads) * d * e + heads * d * e + 4 * heads
    return results, config.width * e, remade


def _feed_forward(config: GPTConfig, e: int, hidden: int | None = None) -> Part:
    hidden = hidden or config.hidden_size
    up = 2 * hidden if config.mlp.gated else hidden
    return up * e, config.width * e, (config.width + hidden) * e


def _experts(config: GPTConfig, e: int) -> Part:
    """Router in f32, K rows a token sorted by expert, both products over them, the combination."""
    spec, c, f = config.moe, config.width, config.expert_hidden_size
    assert spec is not None
    k, up = spec.top_k, 2 * f if config.mlp.gated else f
    results = 4 * spec.num_experts * (1 + spec.noise) + k * (up + c) * e
    unread = 0
    remade = 4 * (3 * k + 1) + k * (c + f) * e  # choices, places, gates; the rows and their activations
    if e == 2 or spec.jitter:
        remade += (
            4 * c * (2 if spec.jitter else 1)
        )  # the router's own input, and what jitter multiplied it by
    if spec.shared_experts:
        results, unread, remade = (
            a + b
            for a, b in zip(
                (results, unread, remade), _feed_forward(config, e, spec.shared_experts * f), strict=True
            )
        )
    elif config.norm.parallel == "shared" or (e == 4 and not spec.jitter):
        remade += c * e  # what the router or attention reads is the layer's input itself
    if spec.noise:
        remade += 4 * 2 * spec.num_experts  # what was drawn, noisy logits
    if spec.balance == "shazeer":
        remade += 4 * (6 * spec.num_experts + 8 * k)  # the odds of each expert to be chosen
    if spec.dropout:
        remade += k * f * e  # a factor for each element
    return results, unread, remade


def _statistics_bytes(kind: str) -> int:
    """f32 a row: 1 / rms, or mean and 1 / deviation."""
    return 8 if kind == "layer_norm" else 4


def _router_copy(config: GPTConfig, e: int) -> int:
    """The f32 copy of a bf16 router, for each layer of experts."""
    spec = config.moe
    return 4 * spec.num_experts * config.width * (1 + spec.noise) if spec and e == 2 else 0


def _ends(config: GPTConfig, e: int, at_once: bool) -> int:
    """A token's: ids, targets, places; what embedding norm and dropout keep; final norm; the loss."""
    c, table = config.width * e, config.table_width * e
    statistics = _statistics_bytes(config.norm.kind)
    kept = 16 + 8 * (config.position.kind == "learned")
    kept += (c + statistics) * (config.embedding_norm + config.norm.has_final)
    kept += c * bool(config.dropout)
    if config.table_width != config.width:
        kept += table + c
    return kept + table + table * at_once + 4


def _loss_workspace(config: GPTConfig, n: int, e: int, at_once: bool) -> int:
    """Scratch of ``csrc/kernels/linear_cross_entropy``, as its contract says (cost)."""
    c, v = config.table_width, config.vocab_size
    words = max(_LEAST_WORDS, min(_MOST_WORDS, v // _STRETCHES))
    if at_once:
        chunk = min(_CHUNK_ROWS, n)
        return 4 * chunk * v + 8 * chunk * c + 8 * words * chunk
    return 2 * n * c * e + 4 * n * c + 2 * words * (n + c) * e
