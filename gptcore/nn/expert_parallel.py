"""One layer of experts over the ranks of a group: who sends which rows where, and the way there and back.

Every rank gathers the logits of all ranks' tokens and runs the router on them, so that choices, places, drops and
losses are one process's by construction, and every rank knows what all others send. Rows then go to their experts'
ranks by all-to-all, are put in the order they would have in one process, and go back the same way.

Letters: N tokens of all ranks, n of this one, K choices, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.dist import Member, Shard, agree, exchange_rows, gather_rows

if TYPE_CHECKING:
    from gptcore.nn.moe import Engine, MoE

_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


class Journey(NamedTuple):
    """What one rank sends and receives.

    rows, offsets: (n, K) and (E + 1,) int32: its own kept choices sorted by expert, as ``moe_dispatch`` takes them.
    send, receive: rows to and from each rank.
    places: (M, 1) int32: of each received row, its row among those of the own experts sorted by expert.
    expert_offsets: (own experts + 1,) int32, their bounds.
    """

    rows: Tensor
    offsets: Tensor
    send: list[int]
    receive: list[int]
    places: Tensor
    expert_offsets: Tensor


def forward(layer: MoE, x: Tensor, mask: Tensor | None, drop: bool, member: Member) -> tuple[Tensor, Any]:
    """(n, C) of the experts for this rank's x, and the routing of all ranks' tokens."""
    engine = layer.engine(x)
    flat, mask, scores, tokens = _begin(layer, engine, x, mask, drop, member)
    if mask is not None:
        mask = gather_rows(mask, tokens, member)

    def drawn(numbers: Tensor) -> Tensor:
        c10d.broadcast(numbers, group=member.group, group_src=0)
        return numbers

    clean, raw_scale = (None if one is None else gather_rows(one, tokens, member) for one in scores)
    assert clean is not None and layer.up.shard is not None
    # Every rank draws random numbers for all tokens, so that generators which agree go on agreeing.
    routing = layer.route(engine, clean, raw_scale, mask, drop, drawn)
    there = journey(routing.rows, routing.offsets, tokens, layer.up.shard)
    rows = engine.dispatch(flat, there.rows, there.offsets)
    # Between the exchanges gradients are over P, and so are those of the experts, without a pass over their weights.
    ranks = member.ranks
    arrived = exchange_rows(rows, there.send, there.receive, member, gradient_scale=ranks)
    rows = engine.dispatch(arrived, there.places, there.expert_offsets)
    rows = layer.apply_experts(engine, rows, there.expert_offsets)
    leaving = engine.combine(rows, there.places, there.expert_offsets)
    rows = exchange_rows(
        leaving, there.receive, there.send, member, rows=there.rows.numel(), gradient_scale=1 / ranks
    )
    first = sum(tokens[: member.rank])
    gates = routing.gates[first : first + tokens[member.rank]]
    return engine.combine(rows, there.rows, there.offsets, gates), routing


def _begin(
    layer: MoE, engine: Engine, x: Tensor, mask: Tensor | None, drop: bool, member: Member
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor | None], list[int]]:
    """Checked input, own scores (n, E), and every rank's number of tokens; raises on all ranks if on one."""
    error: Exception | None = None
    flat = x
    scores: tuple[Tensor, Tensor | None] = (x, None)
    try:
        flat, mask = layer.checked(x, mask)
        scores = layer.scores(engine, flat)
    except (ValueError, TypeError, RuntimeError) as refused:
        error = refused
    differentiated = torch.is_grad_enabled()
    same = {
        "width of x": x.shape[-1],
        "dtype of x": _DTYPES.index(x.dtype) if x.dtype in _DTYPES else -1,
        "training mode": layer.training,
        "drop": drop,
        "gradients of x": differentiated and x.requires_grad,
        "gradients of the router": differentiated and scores[0].requires_grad,
    }
    everyone = agree("MoE", member, same, [flat.shape[0], mask is not None], error)
    if mask is None and any(masked for _, masked in everyone):
        mask = torch.ones(flat.shape[0], dtype=torch.bool)  # where one rank pads, no other needs to
    return flat, mask, scores, [count for count, _ in everyone]


def journey(rows: Tensor, offsets: Tensor, tokens: Sequence[int], shard: Shard) -> Journey:
    """From the router's rows (N, K) and offsets (E + 1,) of all ranks' tokens, of which rank r has ``tokens[r]``."""
    _, rank, ranks = shard.member
    home = torch.repeat_interleave(torch.arange(ranks), torch.tensor(tokens))[:, None].expand(rows.shape)
    kept = rows >= 0
    source = home.new_empty(int(offsets[-1]))  # of every row, the rank that its token is on
    source[rows[kept].long()] = home[kept]
    # A rank sends its rows in their global order, in which they are sorted by expert and so by destination.
    before = torch.zeros(len(source) + 1, dtype=torch.int32)
    torch.cumsum(source == rank, 0, dtype=torch.int32, out=before[1:])
    first = sum(tokens[:rank])
    own = rows[first : first + tokens[rank]]
    own_offsets = before[offsets.long()]
    begin, end = int(offsets[shard.start]), int(offsets[shard.stop])
    arriving = source[begin:end]
    return Journey(
        rows=torch.where(own >= 0, before[own.clamp(min=0).long()], -1),
        offsets=own_offsets,
        send=own_offsets[list(shard.bounds)].diff().tolist(),
        receive=torch.bincount(arriving, minlength=ranks).tolist(),
        # What arrives is sorted by rank first, stably.
        places=torch.argsort(arriving, stable=True).int()[:, None],
        expert_offsets=offsets[shard.start : shard.stop + 1] - begin,
    )
