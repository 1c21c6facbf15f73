"""What a training step keeps of activations, by formula, without building the model.

Bytes that ``GPT`` leaves for its backward pass as its code is. Attention keeps no scores and the fused loss no logits,
so nothing grows with T² or with V times tokens. Three amounts are kept (``checkpointing``):

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
from typing import NamedTuple

from gptcore.models import accounting
from gptcore.models.block_activations import (
    CHECKPOINTING,
    BlockActivations,
    Checkpointing,
    block_activations,
    lacking_inputs,
    router_copy,
    statistics_bytes,
)
from gptcore.models.config import GPTConfig

__all__ = ["CHECKPOINTING", "Activations", "Checkpointing", "Moment", "activations", "gradients_at_once"]

# What ops/linear_cross_entropy.py and its contract say: tokens of a chunk, words of a stretch of the vocabulary.
_CHUNK_ROWS = 512
_MOST_WORDS, _LEAST_WORDS, _STRETCHES = 1024, 256, 32


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
    of_pass = _Pass(config, tokens, element_bytes, checkpointing)
    blocks = _blocks(of_pass)
    ends = tokens * _ends(of_pass)
    again = tokens * max(of_pass.block(kind).made_again(checkpointing) for kind in of_pass.kinds)
    moments = _moments(of_pass, blocks + ends, again)
    return Activations(blocks, ends, again, moments, _loss_workspace(of_pass))


def gradients_at_once(tokens: int, element_bytes: int) -> bool:
    """Whether the loss makes its gradients in forward: see ``ops/linear_cross_entropy.py``."""
    return element_bytes == 4 or tokens <= _CHUNK_ROWS


class _Pass(NamedTuple):
    """What is counted."""

    config: GPTConfig
    tokens: int
    e: int
    checkpointing: Checkpointing

    @property
    def at_once(self) -> bool:
        return gradients_at_once(self.tokens, self.e)

    @property
    def kinds(self) -> dict[bool, int]:
        """How many blocks have experts, and how many not."""
        experts = len(self.config.expert_layers)
        counts = {False: self.config.num_layers - experts, True: experts}
        return {kind: layers for kind, layers in counts.items() if layers}

    def block(self, has_experts: bool) -> BlockActivations:
        return block_activations(self.config, has_experts, self.e)


def _blocks(of: _Pass) -> int:
    """Kept by all blocks."""
    kept = sum(layers * of.block(kind).kept(of.checkpointing) for kind, layers in of.kinds.items())
    if of.checkpointing == "none":
        return of.tokens * kept + of.kinds.get(True, 0) * router_copy(of.config, of.e)
    kept -= lacking_inputs(of.config, of.e)
    if of.checkpointing == "selective":  # the last block passes nothing on
        kept += of.block(of.config.has_experts(of.config.num_layers - 1)).passed_on
    return of.tokens * kept


def _moments(of: _Pass, kept: int, again: int) -> tuple[Moment, ...]:
    """In the loss; in the last feed-forward; in the first, or the first layer of experts, whose weights are many,
    before and after its first product; at the end."""
    config, tokens, e = of.config, of.tokens, of.e
    head = config.vocab_size * config.table_width
    freed = config.table_width * (1 + of.at_once) + config.width * config.norm.has_final
    freed += config.width * (config.table_width != config.width)
    last = _FeedForward.of(config, config.num_layers - 1)
    layer = config.expert_layers[0] if config.expert_layers else 0
    first, block = _FeedForward.of(config, layer), of.block(config.has_experts(layer))
    there = block.results + block.remade + block.inputs + layer * of.block(False).kept(of.checkpointing)
    total = accounting.parameter_counts(config).total
    made = total - _not_reached(config, layer)
    at_end = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + 2 * config.width
    return (
        Moment("loss", kept + (0 if of.at_once else tokens * config.table_width * e), head),
        Moment("last block", kept + again + tokens * (last.inside - freed) * e, head + last.down),
        Moment("first block", tokens * (there + first.inside * e), made + first.down),
        Moment("its weights", tokens * (there + first.after * e), made + first.down + first.up),
        Moment("end", tokens * at_end * e, total),
    )


def _not_reached(config: GPTConfig, layer: int) -> int:
    """Parameters of the blocks up to ``layer``, and of what is outside the blocks without the head."""
    shapes = accounting.root_shapes(config)
    for before in range(layer + 1):
        shapes += accounting.block_shapes(config, config.has_experts(before))
    return sum(map(math.prod, shapes)) - config.vocab_size * config.table_width


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
        # experts' rows are gone when those of their gradients come
        stream = config.width * (1 - rows if spec else 1)
        after = config.width * (1 + rows) - rows * hidden
        weight = experts * hidden * config.width
        return cls(stream + up, after, weight * (1 + config.mlp.gated), weight)


def _ends(of: _Pass) -> int:
    """A token's: ids, targets, places; what embedding norm and dropout keep; final norm; the loss."""
    config = of.config
    c, table = config.width * of.e, config.table_width * of.e
    kept = 16 + 8 * (config.position.kind == "learned")
    kept += (c + statistics_bytes(config.norm.kind)) * (config.embedding_norm + config.norm.has_final)
    kept += c * bool(config.dropout)
    if config.table_width != config.width:
        kept += table + c
    return kept + table + table * of.at_once + 4


def _loss_workspace(of: _Pass) -> int:
    """Scratch of ``csrc/kernels/linear_cross_entropy``, as its contract says (cost)."""
    n, e, c, v = of.tokens, of.e, of.config.table_width, of.config.vocab_size
    words = max(_LEAST_WORDS, min(_MOST_WORDS, v // _STRETCHES))
    if of.at_once:
        chunk = min(_CHUNK_ROWS, n)
        return 4 * chunk * v + 8 * chunk * c + 8 * words * chunk
    return 2 * n * c * e + 4 * n * c + 2 * words * (n + c) * e
