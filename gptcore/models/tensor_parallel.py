"""How a GPT is cut over a tensor group, and what its forward passes agree on first.

Letters: H query heads, Hkv key and value heads, D head size, C width, F feed-forward width, V vocabulary, P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gptcore.dist import Member, Shard, TensorShard, TensorSplit, agree
from gptcore.dist.same_module import checksum
from gptcore.dist.tensor_shard import cut_parameter, shard_of
from gptcore.models.block import Attention, Mlp
from gptcore.models.config import GPTConfig
from gptcore.models.norm import Norm
from gptcore.models.summed_gradients import SharedGradient
from gptcore.nn.tensor_parallel import TensorPass

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT

Pieces = tuple[tuple[tuple[int, int], ...], ...]


def obstacle(config: GPTConfig, ranks: int, sequence_parallel: bool) -> str | None:
    """Why a model of ``config`` cannot be cut over ``ranks`` ranks."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % ranks:
        return f"got {heads} heads, expected a multiple of the {ranks} ranks"
    if kv_heads % ranks and ranks % kv_heads:
        return f"got {kv_heads} key/value heads, expected a multiple or a divisor of the {ranks} ranks"
    if config.hidden_size < ranks or config.vocab_size < ranks:
        got = f"a feed-forward of {config.hidden_size} and {config.vocab_size} words"
        return f"got {got}, expected at least one of each for each of {ranks} ranks"
    if sequence_parallel and config.table_width != config.width:
        return "got an embedding_width other than the width, expected none with sequence_parallel"
    return None


def cut(model: GPT, split: TensorSplit) -> None:
    """Keep the pieces of this rank, in parameters of their own."""
    member = split.member
    for module in model.modules():
        if isinstance(module, Attention):
            _cut_attention(module, member)
        elif isinstance(module, Mlp):
            _cut_feed_forward(module, member)
    words = _even(Shard.of(model.config.vocab_size, member))
    _keep(model.token_embedding, "weight", 0, words, member)
    model.token_embedding.num_embeddings = len(model.token_embedding.weight)
    if model.head is not None:
        _keep_outputs(model.head, words, member)


def _cut_attention(attention: Attention, member: Member) -> None:
    ranks, size = member.ranks, attention.head_dim
    heads, kv_heads = attention.heads // ranks, max(attention.kv_heads // ranks, 1)
    sharing = max(ranks // attention.kv_heads, 1)  # ranks with the same key and value heads
    own_q = [(rank * heads, (rank + 1) * heads) for rank in range(ranks)]
    own_kv = [(rank // sharing * kv_heads, (rank // sharing + 1) * kv_heads) for rank in range(ranks)]
    keys, values = attention.heads, attention.heads + attention.kv_heads

    def rows(piece: tuple[int, int], before: int = 0) -> tuple[int, int]:
        return ((before + piece[0]) * size, (before + piece[1]) * size)

    fused = tuple((rows(q), rows(kv, keys), rows(kv, values)) for q, kv in zip(own_q, own_kv, strict=True))
    _keep_outputs(attention.qkv, fused, member)
    _keep_inputs(attention.out, tuple((rows(q),) for q in own_q), member)
    if attention.sinks is not None:
        _keep(attention, "sinks", 0, tuple((q,) for q in own_q), member)
    if attention.slopes is not None:
        attention.slopes = attention.slopes[slice(*own_q[member.rank])]
        attention._sent_slopes.clear()
    attention.heads, attention.kv_heads = heads, kv_heads
    attention.dropout_offset += member.rank << 16  # each rank's first head is head 0 to the kernel


def _cut_feed_forward(layer: Mlp, member: Member) -> None:
    hidden = Shard.of(layer.down.in_features, member)
    pieces = _even(hidden)
    second = tuple(((start + hidden.total, stop + hidden.total),) for ((start, stop),) in pieces)
    both = tuple(gate + up for gate, up in zip(pieces, second, strict=True)) if layer.gated else pieces
    _keep_outputs(layer.up, both, member)
    _keep_inputs(layer.down, pieces, member)


def _even(shard: Shard) -> Pieces:
    return tuple(((start, stop),) for start, stop in zip(shard.bounds, shard.bounds[1:], strict=False))


def _keep_outputs(linear: nn.Linear, pieces: Pieces, member: Member) -> None:
    _keep(linear, "weight", 0, pieces, member)
    if linear.bias is not None:
        _keep(linear, "bias", 0, pieces, member)
    linear.out_features = linear.weight.shape[0]


def _keep_inputs(linear: nn.Linear, pieces: Pieces, member: Member) -> None:
    _keep(linear, "weight", 1, pieces, member)
    linear.in_features = linear.weight.shape[1]


def _keep(module: nn.Module, name: str, dim: int, pieces: Pieces, member: Member) -> None:
    total = getattr(module, name).shape[dim]
    cut_parameter(module, name, TensorShard(member, dim, total, pieces))


def shared_gradients(model: GPT, split: TensorSplit) -> list[SharedGradient]:
    """The parameters of which several ranks have the same and each, after backward, a part of the gradient."""
    return list(_shared(model, split))


def _shared(model: GPT, split: TensorSplit) -> Iterator[SharedGradient]:
    everyone = range(split.member.ranks)
    for name, module in model.named_modules():
        by_head = name.endswith(("q_norm", "k_norm"))
        if isinstance(module, Norm) and (by_head or split.sequence_parallel):
            yield from _all_of(module, ["weight", "bias"], everyone)
        elif isinstance(module, Attention):
            yield from _shared_heads(module, split.member)
            if split.sequence_parallel:
                yield from _all_of(module.out, ["bias"], everyone)
        elif isinstance(module, Mlp) and split.sequence_parallel:
            yield from _all_of(module.down, ["bias"], everyone)
    if split.sequence_parallel and model.position_embedding is not None:
        yield from _all_of(model.position_embedding, ["weight"], everyone)


def _all_of(module: nn.Module, names: list[str], ranks: range) -> Iterator[SharedGradient]:
    for name in names:
        parameter = getattr(module, name)
        if parameter is not None:
            yield SharedGradient(module, name, 0, len(parameter), ranks)


def _shared_heads(attention: Attention, member: Member) -> Iterator[SharedGradient]:
    """Rows of key and value heads that several ranks have."""
    shard = shard_of(attention.qkv, "weight")
    ranks = [rank for rank, pieces in enumerate(shard.pieces) if pieces[1] == shard.own[1]]
    if len(ranks) == 1:
        return
    first = attention.heads * attention.head_dim
    for name in ("weight", "bias"):
        parameter = getattr(attention.qkv, name)
        if parameter is not None:
            yield SharedGradient(attention.qkv, name, first, len(parameter), range(ranks[0], ranks[-1] + 1))


def begin(
    model: GPT,
    split: TensorSplit,
    tokens: Tensor,
    targets: Tensor | None,
    cu_seqlens: Tensor | None,
    before: int,
) -> TensorPass:
    """A forward pass, after all ranks said that they can go on and found their arguments equal."""
    error: Exception | None = None
    try:
        model.check(tokens, cu_seqlens, before)
        _check_words(tokens, model.config.vocab_size)
    except (ValueError, TypeError) as refused:
        error = refused
    same = {
        "shape of tokens (CRC-32)": checksum(torch.tensor(tokens.shape)),
        "contents of tokens (CRC-32)": checksum(tokens),
        "contents of targets (CRC-32)": -1 if targets is None else checksum(targets),
        "contents of cu_seqlens (CRC-32)": -1 if cu_seqlens is None else checksum(cu_seqlens),
        "cached tokens": before,
        "training mode": model.training,
        "gradients": torch.is_grad_enabled(),
        "random generator (CRC-32)": checksum(torch.get_rng_state()) if _draws(model) else -1,
    }
    agree("GPT", split.member, same, error=error)
    shape = (tokens.numel(),) if cu_seqlens is not None else tuple(tokens.shape)
    rows = Shard.of(tokens.numel(), split.member) if split.sequence_parallel else None
    return TensorPass(split.member, shape, rows)


def _check_words(tokens: Tensor, words: int) -> None:
    """Each rank looks up its own words alone, so that nobody else would find that one is nobody's."""
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= words:
        got = least if least < 0 else most
        raise ValueError(f"GPT: argument 'tokens': got {got}, expected 0 to {words - 1}")


def _draws(model: GPT) -> bool:
    """Whether a pass draws random numbers that must be the same on all ranks."""
    config, moe = model.config, model.config.moe
    of_experts = moe is not None and (
        moe.dropout > 0 or moe.jitter > 0 or moe.noise or moe.priority == "random"
    )
    wild = config.dropout > 0 or config.attention.dropout > 0 or of_experts
    return model.training and (wild or (moe is not None and moe.second_choice != "always"))
