"""What attention's tests hold the kernel against: the float64 reference, and torch's own attention as the yardstick."""

from __future__ import annotations

from typing import Any

import torch

from gptcore import ops
from gptcore.ops.attention import attention, attention_reference, option_values
from gptcore.ops.attention_dropout import dropout_factors
from tests.tolerance import ROUNDOFF, assert_close_to_exact, assert_same_for_threads, same_bits

DTYPES = [torch.float32, torch.bfloat16]


def inputs(batch: int, queries: int, keys: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    q = torch.randn(batch, queries, heads, size).to(dtype)
    k, v = (torch.randn(batch, keys, kv_heads, size).to(dtype) for _ in range(2))
    return q, k, v


def shapes_for(isa: str, shapes: Any) -> Any:
    """``shapes``, (T, S, H, ...) each; where the processor plays the GPU, which takes some microseconds for each score,
    those of them with few scores."""
    return [x for x in shapes if isa != "simt" or x[0] * x[1] * x[2] <= 9000]


def size_for(isa: str, size: Any, small: Any) -> Any:
    return small if isa == "simt" else size


def assert_same_in_every_run(isa: str, step: Any) -> None:
    """The same bits in two runs, on the processor itself for every thread count."""
    assert_same_for_threads(step, counts=size_for(isa, (1, 2, 4), (1,)))


def torch_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal=False,
    window_size=(-1, -1),
    softmax_scale=None,
    sinks=None,
    **modifiers: Any,
):
    """torch's own attention under the same mask: the yardstick for errors. With modifiers, put together from torch's
    functions as its attention does it: scores and softmax in f32, the products in q's dtype."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        seen &= key >= place - left
    if right >= 0:
        seen &= key <= place + right
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    if modifiers or sinks is not None:
        scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        scores = modified(scores, (place - key).abs(), **modifiers).masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
        p = (scores - scores.amax(-1, True).clamp_min(-1e30)).exp()
        p = (p / p.sum(-1, True).clamp_min(1e-30))[..., :keys]
        return (p.to(v.dtype) @ v).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale)
    return out.transpose(1, 2).nan_to_num(0.0)


def torch_dropout(
    q: Any, k: Any, v: Any, *, dropout_p: float, seed: Any, offset: int = 0, causal=False, window_size=(-1, -1),
    first: int = 0, prefix_lengths=None,
) -> Any:  # fmt: skip
    """Put together from torch's functions as its own attention is, with the kernel's mask: the yardstick for errors."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = (key < place - left) & (left >= 0) | (key > place + right) & (right >= 0)
    if prefix_lengths is not None:
        hidden = hidden & (key >= prefix_lengths[:, None, None, None])
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    p = (scores - scores.amax(-1, True).clamp_min(-1e30)).exp()
    p = p / p.sum(-1, True).clamp_min(1e-30)
    p = p * dropout_factors(tuple(p.shape), dropout_p, seed, offset, first=first).float()
    return (p.to(v.dtype) @ v).transpose(1, 2)


def modified(
    scores: Any, distance: Any, *, soft_cap=None, alibi_slopes=None, attn_mask=None, attn_bias=None
) -> Any:
    """Scores (B, H, T, S) as the options change them."""
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * distance
    if attn_bias is not None:
        scores = scores + attn_bias.float()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores


def gradients_of(function: Any, tensors: Any, grad: torch.Tensor, **options: Any):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))


def check(tensors: Any, twin: Any = torch_attention, *, drift: float = 0.0, **options: Any) -> None:
    """Output, lse and gradients against the float64 reference.

    Args:
        drift: share of itself by which a probability of backward may be off, where scores are so large that their own
            roundings and those of lse show.
    """
    q, k, _ = tensors
    # The gradient as the kernel sees it: rounding it to bf16 is no error of the kernel's.
    grad = torch.randn(q.shape).to(q.dtype)
    got, got_gradients = gradients_of(attention, tensors, grad, **options)
    doubles = [x.double() for x in tensors]
    exact, exact_gradients = gradients_of(attention_reference, doubles, grad, **options)
    mine, mine_gradients = gradients_of(twin, tensors, grad, **options) if twin else (None, [None] * 3)
    length = k.shape[-3] * q.shape[-1]
    assert_close_to_exact(got, exact, mine, terms=length, what="out")
    # dS = P (dP - delta) cancels: with few keys the gradients of q and k are differences of numbers of the size of
    # dout * v, and a lone key's are exactly zero in float64.
    summand = (grad.double().norm(dim=-1).max() * doubles[2].norm(dim=-1).max()).item() if k.numel() else 0.0
    scale = options.get("softmax_scale") or q.shape[-1] ** -0.5
    other = (
        max(doubles[0].abs().max().item(), doubles[1].abs().max().item()) if k.numel() and q.numel() else 0.0
    )
    terms = max(q.shape[-3], length)
    # bf16 kernels round P and dS before their products, as torch's does: every summand is off by up to 2^-9 of itself,
    # where the floor counts f32's 2^-24. P adds up to one, so the sum is off by that share of the largest summand.
    rounding = 2.0**15 / terms**0.5 if q.dtype == torch.bfloat16 else 1.0
    drifts = _drifted(doubles, grad, drift, summand * abs(scale) * other, **options) if drift else [0.0] * 3
    f32 = 2 * ROUNDOFF[torch.float32] * terms**0.5  # what assert_close_to_exact makes of `summand`
    for name, a, b, c, off in zip("qkv", got_gradients, exact_gradients, mine_gradients, drifts, strict=True):
        size = 0.0 if name == "v" else summand * abs(scale) * other * rounding
        assert_close_to_exact(a, b, c, terms=terms, summand=size + off / f32, what=f"gradient of {name}")
    with torch.no_grad():
        lse = attention(*tensors, return_lse=True, **options)[1]
    exact_lse = attention_reference(*doubles, return_lse=True, **options)[1]
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    # f32 roundings of the score sums and of the sum of exponentials; bf16 tensors take the short polynomial (1.0e-4).
    bound = 2.0**-23 * length**0.5 * max(1.0, exact_lse[seen].abs().max().item() if seen.any() else 0.0)
    bound += 1.1e-4 if q.dtype == torch.bfloat16 else 2.0**-22
    assert (lse[seen].double() - exact_lse[seen]).abs().max().item() <= bound if seen.any() else True


def _drifted(
    doubles: Any, grad: torch.Tensor, drift: float, score_gradient: float, **options: Any
) -> list[float]:
    """How far the gradients of q, k and v may move where each probability moves by ``drift`` of itself."""
    q, k, v = doubles
    # dv = sum P dout, so it moves by at most drift sum P |dout|: the same gradient of |dout|.
    _, (_, _, sums) = gradients_of(attention_reference, (q, k, v), grad.abs(), **options)
    # dq = scale sum P (dP - delta) k: the probabilities of a row add up to 1, those of a key to one for each of its
    # rows at most, and |dP - delta| <= 2 |dout| |v|.
    rows = q.shape[-3] * (q.shape[-2] // k.shape[-2])
    return [drift * x for x in (2 * score_gradient, 2 * score_gradient * rows, sums.abs().max().item())]


def check_ops(tensors: Any, **options: Any) -> None:
    """opcheck of both ops: schema, fake implementation, autograd formula, and torch.compile without values."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
    given = (*option_values("attention", q, q.shape[-1], options), True)
    torch.library.opcheck(torch.ops.gptcore.attention.default, (q, k, v, None, None, *given))
    qkv = torch.cat([q, k, v], 2).flatten(2).detach().requires_grad_()
    heads = q.shape[2], k.shape[2]
    torch.library.opcheck(torch.ops.gptcore.attention_qkv.default, (qkv, None, *heads, *given))


def check_compiled(tensors: Any, **options: Any) -> None:
    """Both ops within one compiled graph, backward included: the bits of eager calls."""

    def block(q: Any, k: Any, v: Any) -> Any:
        out = ops.attention(q, k, v, **options)
        qkv = torch.cat([out, k, v], 2).flatten(2)
        return out.flatten(2) * 2 + ops.attention_qkv(qkv, q.shape[2], k.shape[2], **options)

    eager, compiled = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    block(*eager).sum().backward()
    torch.compile(block, fullgraph=True)(*compiled).sum().backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(eager, compiled, strict=True))
