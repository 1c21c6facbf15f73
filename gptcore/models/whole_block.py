"""A block as one step of autograd: its kernels one after another, with no module and no graph between them.

For few tokens of a narrow model, as in decoding and in learning from rewards, a block's kernels take less time than the
calls around them: 12 modules, 9 nodes of a graph, and as many again in backward. Here the pre-norm block of GPT-2 and
its like calls the same kernels with the same operands in the same order, so results and gradients keep their bits.
Whatever wants to see the parts (a hook, a mode, a compiler, adapters, ranks) gets the modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from gptcore import backend, ops
from gptcore.models.norm import Norm
from gptcore.nn.feed_forward import KINDS
from gptcore.nn.linear import SMALL, Linear, moves
from gptcore.nn.support import is_watched, served
from gptcore.ops.attention_options import values_of

if TYPE_CHECKING:
    from gptcore.models.block import Block, Context

# Entries of the stream, rows by width, up to which a block is run so. Of larger ones the calls are hardly seen beside
# the kernels, and autograd, which frees values and gives gradients one by one, holds less at a time.
LARGEST = 1 << 16


class _How(NamedTuple):
    """What the kernels of a block are told."""

    heads: int
    kv_heads: int
    size: int  # of a head
    options: tuple[Any, ...]  # of attention
    eps: float
    offset: float  # added to the norms' weights
    kind: int  # of activation


def serves(block: Block, x: Tensor, delta: Tensor | None, context: Context) -> bool:
    """Whether ``block`` may be run as a whole on the stream x + delta."""
    return (
        not torch.compiler.is_compiling()
        and block.sequential
        and x.numel() <= LARGEST
        and served("layer_norm", x)
        and (x.device.type == "cpu" or backend.has_kernels(x.device, "attention", "gated_activation"))
        and x.is_contiguous()
        and (delta is None or (delta.is_contiguous() and delta.dtype == x.dtype))
        and (type(block.dropout) is nn.Identity or not block.training)
        and context.tensor is context.prefix is context.seed is context.rotary is None
        and not hasattr(context.cache, "attend")
        and _unseen()
        and _plain(block, x)
        and (not _learns(block, x, delta) or (context.cache is None and block.norm1.weight.requires_grad))
    )


def run(block: Block, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
    """``block(x, delta, context)`` where :func:`serves` says so."""
    attention, mlp = block.attention, block.mlp
    norm1 = block.norm1
    options = values_of(
        x, attention.head_dim, attention.causal, attention.window_size, attention.softmax_scale, attention.soft_cap,
        None, None, None, None, 0.0, None, 0, None, 0, 0,
    )  # fmt: skip
    how = _How(
        attention.heads, attention.kv_heads, attention.head_dim, options, norm1.eps, norm1.weight_offset,
        KINDS[mlp.activation],
    )  # fmt: skip
    weights = [p for part in _parts(block) for p in (part.weight, part.bias)]
    if _learns(block, x, delta):
        stream, out = _Whole.apply(x, delta, context.cu_seqlens, how, *weights)
        return stream, out
    values = _forward(x, delta, context.cu_seqlens, how, weights, (context.cache, attention.layer))
    return values.stream2, values.out


def _learns(block: Block, x: Tensor, delta: Tensor | None) -> bool:
    """Whether backward will come by here, to the weights or to what is before them."""
    return torch.is_grad_enabled() and (
        block.norm1.weight.requires_grad or x.requires_grad or (delta is not None and delta.requires_grad)
    )


def _parts(block: Block) -> tuple[Any, ...]:
    attention, mlp = block.attention, block.mlp
    return block.norm1, attention.qkv, attention.out, block.norm2, mlp.up, mlp.down


def _plain(block: Block, x: Tensor) -> bool:
    """Whether the modules are those that they began as, nobody watches them, and all of them learn or none."""
    parts = _parts(block)
    if any(is_watched(one) for one in (*parts, block.attention, block.mlp)):
        return False
    if any(type(one) is not (Norm if i in (0, 3) else Linear) for i, one in enumerate(parts)):
        return False
    weights = [p for one in parts for p in (one.weight, one.bias) if p is not None]
    learnt = weights[0].requires_grad
    return all(
        type(p) is nn.Parameter
        and p.dtype == x.dtype
        and p.device == x.device
        and p.requires_grad == learnt
        and p.is_contiguous()
        for p in weights
    )


def _unseen() -> bool:
    """Whether no mode, transform, autocast or hook of all modules wants to see each call."""
    native = torch._C
    return not (
        torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or native._len_torch_dispatch_stack()
        or native._len_torch_function_stack()
        or native._functorch.peek_interpreter_stack() is not None
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


class _Values(NamedTuple):
    """What a forward makes, N rows each; backward reads all but ``out``."""

    stream1: Tensor  # x + delta
    statistics1: Tensor | None
    normed1: Tensor
    qkv: Tensor
    attended: Tensor
    lse: Tensor | None
    stream2: Tensor  # and attention's output
    statistics2: Tensor | None
    normed2: Tensor
    up: Tensor
    hidden: Tensor
    out: Tensor


def _forward(
    x: Tensor, delta: Tensor | None, bounds: Tensor | None, how: _How, weights: list[Any],
    cache: tuple[Any, int] | None = None,
) -> _Values:  # fmt: skip
    """``cache`` is None where backward follows, else the cache or None, and the layer's number in it."""
    native, learns = backend.extension(), cache is None
    gain1, shift1, qkv_weight, qkv_bias, out_weight, out_bias, gain2, shift2, *feed_forward = weights
    up_weight, up_bias, down_weight, down_bias = feed_forward
    lead, rows = x.shape[:-1], x.numel() // x.shape[-1]
    statistics = [x.new_empty(2, rows, dtype=torch.float32) if learns else None for _ in range(2)]
    normed1, stream1 = torch.empty_like(x), x if delta is None else torch.empty_like(x)
    written = None if delta is None else stream1
    native.layer_norm_forward(x, delta, gain1, shift1, how.eps, how.offset, normed1, written, statistics[0])
    qkv = _affine(normed1, qkv_weight, qkv_bias, not learns)
    attended, lse = _attend(qkv, bounds, how, learns, cache)
    between = _affine(attended, out_weight, out_bias, not learns)
    normed2, stream2 = torch.empty_like(x), torch.empty_like(x)
    native.layer_norm_forward(
        stream1, between, gain2, shift2, how.eps, how.offset, normed2, stream2, statistics[1]
    )
    up = _affine(normed2, up_weight, None, not learns)
    hidden = x.new_empty(*lead, down_weight.shape[1])
    native.gated_activation_forward(how.kind, up, None, up_bias, None, hidden)
    out = _affine(hidden, down_weight, down_bias, not learns)
    return _Values(
        stream1, statistics[0], normed1, qkv, attended, lse, stream2, statistics[1], normed2, up, hidden, out
    )


def _attend(
    qkv: Tensor, bounds: Tensor | None, how: _How, learns: bool, cache: tuple[Any, int] | None
) -> tuple[Tensor, Tensor | None]:
    """Attention's output (..., H D), and each row's log-sum-exp where backward wants it."""
    lead = qkv.shape[:-1]
    q, k, v = _heads(qkv, how)
    if cache is not None and cache[0] is not None:
        k, v = cache[0].update(cache[1], k, v)
    out, lse = qkv.new_empty(*lead, how.heads, how.size), None
    if learns:
        shape = (lead[0], how.heads, lead[1]) if len(lead) == 2 else (how.heads, lead[0])
        lse = qkv.new_empty(*shape, dtype=torch.float32)
    backend.extension().attention_forward(q, k, v, bounds, bounds, how.options, out, lse)
    return out.view(*lead, how.heads * how.size), lse


def _heads(qkv: Tensor, how: _How) -> tuple[Tensor, Tensor, Tensor]:
    """Views of query, key and value heads."""
    split = qkv.view(*qkv.shape[:-1], how.heads + 2 * how.kv_heads, how.size)
    return (
        split.narrow(-2, 0, how.heads),
        split.narrow(-2, how.heads, how.kv_heads),
        split.narrow(-2, how.heads + how.kv_heads, how.kv_heads),
    )


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, decoding: bool) -> Tensor:
    """x @ weight.T + bias, by whom ``gptcore.nn.linear`` has it computed."""
    rows = x.numel() // x.shape[-1]
    if not moves(x, weight) and not (decoding and rows <= SMALL and x.device.type == "cpu"):
        return nn.functional.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    backend.extension().matmul(
        x.view(rows, x.shape[-1]), weight, bias, y.view(rows, weight.shape[0]), False, False, True
    )
    return y


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, bounds: Tensor | None, how: _How, *weights: Any
    ) -> tuple[Tensor, Tensor]:
        values = _forward(x, delta, bounds, how, list(weights))
        ctx.save_for_backward(bounds, *values[:-1], *weights)
        ctx.how, ctx.both = how, delta is not None
        ctx.set_materialize_grads(False)
        return values.stream2, values.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        bounds, *saved = ctx.saved_tensors
        values, weights = saved[: len(_Values._fields) - 1], saved[len(_Values._fields) - 1 :]
        if dout is None:
            dout = torch.zeros_like(values[6])
        dx, gradients = _backward(
            dstream, dout.contiguous(), bounds, ctx.how, _Values._make([*values, dout]), weights, ctx.both
        )
        return dx, dx if ctx.both else None, None, None, *gradients


def _backward(
    dstream: Tensor | None,
    dout: Tensor,
    bounds: Tensor | None,
    how: _How,
    values: _Values,
    weights: list[Any],
    both: bool,
) -> tuple[Tensor, list[Any]]:
    """The gradient of x, which is delta's too where there are ``both``, and those of the weights."""
    native = backend.extension()
    gain1, shift1, qkv_weight, qkv_bias, out_weight, out_bias, gain2, shift2, *feed_forward = weights
    up_weight, up_bias, down_weight, down_bias = feed_forward
    rows = values.stream1.numel() // values.stream1.shape[-1]
    ones = dout.new_ones(1, rows)
    dhidden, *ddown = _affine_backward(dout, values.hidden, down_weight, down_bias, ones)
    dup, dup_bias = torch.empty_like(values.up), None if up_bias is None else torch.empty_like(up_bias)
    native.gated_activation_backward(
        how.kind, dhidden, values.up, None, up_bias, None, dup, None, dup_bias, None
    )
    dnormed, dup_weight, _ = _affine_backward(dup, values.normed2, up_weight, None, ones)
    dbetween, *dnorm2 = _norm_backward(
        dnormed, dstream, values.stream2, gain2, shift2, how, values.statistics2
    )
    dattended, *dout_part = _affine_backward(dbetween, values.attended, out_weight, out_bias, ones)
    dqkv = _attend_backward(dattended, bounds, how, values)
    dnormed, *dqkv_part = _affine_backward(dqkv, values.normed1, qkv_weight, qkv_bias, ones)
    # where nothing was added, autograd adds the stream's two gradients after the norm's is rounded
    beside = dbetween if both else None
    dx, *dnorm1 = _norm_backward(dnormed, beside, values.stream1, gain1, shift1, how, values.statistics1)
    if not both:
        dx = dx + dbetween
    return dx, [*dnorm1, *dqkv_part, *dout_part, *dnorm2, dup_weight, dup_bias, *ddown]


def _affine_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, ones: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias."""
    flat_dy, flat_x = dy.view(-1, dy.shape[-1]), x.view(-1, x.shape[-1])
    dx = _product(flat_dy, weight, False).view(x.shape)
    dbias = None
    if bias is not None:
        dbias = ops.matmul(ones, flat_dy)[0]
    return dx, _product(flat_dy, flat_x, True), dbias


def _product(a: Tensor, b: Tensor, transpose: bool) -> Tensor:
    """a @ b, or a.T @ b."""
    if not moves(a, b):
        return (a.t() if transpose else a) @ b
    out = a.new_empty(a.shape[1 if transpose else 0], b.shape[1])
    backend.extension().matmul(a, b, None, out, False, transpose, False)
    return out


def _norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, gain: Tensor, shift: Tensor | None, how: _How, statistics: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of what was normed, with ``dh`` added, of gain and shift."""
    dx, dgain = torch.empty_like(h), torch.empty_like(gain)
    dshift = None if shift is None else torch.empty_like(shift)
    dh = None if dh is None else dh.contiguous()
    backend.extension().layer_norm_backward(dy, dh, h, gain, how.offset, statistics, dx, dgain, dshift)
    return dx, dgain, dshift


def _attend_backward(dattended: Tensor, bounds: Tensor | None, how: _How, values: _Values) -> Tensor:
    """The gradient of the fused projection."""
    dqkv, shape = torch.empty_like(values.qkv), (*values.qkv.shape[:-1], how.heads, how.size)
    backend.extension().attention_backward(
        dattended.view(shape), *_heads(values.qkv, how), values.attended.view(shape), values.lse, bounds, bounds,
        how.options, *_heads(dqkv, how), None, None, None,
    )  # fmt: skip
    return dqkv
