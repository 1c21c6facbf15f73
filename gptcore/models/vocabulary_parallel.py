"""Token embedding, head and loss of a vocabulary that is cut over a tensor group.

Each rank has the rows of its words. An embedding is found on one rank and is zero on the others; a loss is put together
from each slice's log-sum-exp and the target's logit (Shoeybi et al. 2019, "Megatron-LM", section 3), so that logits
are neither gathered nor kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcore.dist import TensorShard
from gptcore.dist.row_sums import gather_all
from gptcore.dist.tensor_shard import shard_of
from gptcore.models.tied import TiedTable
from gptcore.nn.embedding import Embedding
from gptcore.nn.tensor_parallel import TensorPass
from gptcore.ops.linear_cross_entropy_slice import (
    IGNORED,
    linear_cross_entropy_slice,
    linear_cross_entropy_slice_backward,
)


class HeadOptions(NamedTuple):
    """What the loss is made with: see ``ops.linear_cross_entropy``."""

    label_smoothing: float
    z_loss: float
    logit_scale: float
    logit_soft_cap: float | None
    reduction: str


def embed(tokens: Tensor, embedding: Embedding, table: TiedTable | None, tensor: TensorPass) -> Tensor:
    """The stream of the rows of ``tokens``."""
    ((start, stop),) = shard_of(embedding, "weight").own
    flat = tokens.reshape(-1)
    here = ((flat >= start) & (flat < stop)).nonzero()[:, 0]
    words = flat[here] - start
    rows = embedding(words) if table is None else table.rows(words)
    partial = rows.new_zeros(len(flat), rows.shape[1]).index_copy(0, here, rows)
    return tensor.sum(partial.view(*tensor.shape, -1))


def loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: TensorShard, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and z-loss, () or (N,), and logprobs (N,) of x (N, C), which all ranks have, against targets (N,)."""
    return _Loss.apply(x, weight, bias, targets, shard, options)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: TensorShard,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ((start, _),) = shard.own
        part = linear_cross_entropy_slice(
            x, weight, targets, start, shard.total, label_smoothing=options.label_smoothing, bias=bias,
            logit_scale=options.logit_scale, logit_soft_cap=options.logit_soft_cap,
        )  # fmt: skip
        kept = targets != IGNORED
        losses, target_logits, lses = gather_all(torch.stack(part), shard.member).double().unbind(1)
        lse = torch.where(kept, torch.logsumexp(lses, 0), 0.0)
        row_loss, row_z = _in_order(losses) + lse, options.z_loss * lse * lse
        logprobs = (_in_order(target_logits) - lse).float()
        count = int(kept.sum()) if options.reduction == "mean" else 1
        if options.reduction != "none":
            row_loss, row_z = _over_rows(row_loss) / count, _over_rows(row_z) / count
        ctx.save_for_backward(x, weight, bias, targets, lse.float())
        ctx.shard, ctx.options, ctx.count = shard, options, count
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.mark_non_differentiable(logprobs)
        ctx.set_materialize_grads(False)
        return row_loss.float(), row_z.float(), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, dz: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, targets, lse = ctx.saved_tensors
        o: HeadOptions = ctx.options
        dloss, dz = (None if g is None else _of_rows(g, ctx.count, len(lse)) for g in (dloss, dz))
        gradients = linear_cross_entropy_slice_backward(
            dloss, dz, x, weight, targets, lse, ctx.shard.own[0][0], ctx.shard.total, z_loss=o.z_loss,
            label_smoothing=o.label_smoothing, logit_scale=o.logit_scale, bias=bias,
            logit_soft_cap=o.logit_soft_cap, main_grad=ctx.main_grad, wanted=ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *gradients, None, None, None


def _in_order(parts: Tensor) -> Tensor:
    """The sum of parts (P, N) over ranks, in rank order."""
    total, *others = parts.unbind()
    for part in others:
        total = total + part
    return total


def _over_rows(values: Tensor) -> Tensor:
    """The sum of (N,) f64, one after the other, whatever the number of threads; 0 of none."""
    return values.cumsum(0)[-1] if len(values) else values.sum()


def _of_rows(gradient: Tensor, count: int, rows: int) -> Tensor:
    """(N,): the gradient of each row's loss, whose sum over ``count`` has ``gradient``."""
    return (gradient / max(count, 1)).expand(rows).contiguous()
