"""Every function of gptcore.ops on arrays of any framework: what the NumPy and CuPy tests run, without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Inputs:
    """Draws a case's inputs from its name, as NumPy arrays that ``convert`` turns into the framework's.

    Args:
        convert: of a NumPy array, bf16 as ml_dtypes.
        half: floating inputs that may be bf16 are.
    """

    def __init__(self, name: str, convert: Callable[[Any], Any], half: bool) -> None:
        self._generator = np.random.default_rng(list(name.encode()))
        self._convert, self.half = convert, half

    def f32(self, *shape: int) -> Any:
        return self._convert(self._generator.standard_normal(shape, np.float32))

    def real(self, *shape: int) -> Any:
        return self._convert(_rounded(self._generator.standard_normal(shape, np.float32), self.half))

    def bf16(self, *shape: int) -> Any:
        return self._convert(_rounded(self._generator.standard_normal(shape, np.float32), True))

    def integers(self, low: int, high: int, *shape: int, dtype: str = "int64") -> Any:
        return self._convert(self._generator.integers(low, high, shape).astype(dtype))

    def of(self, values: Any, dtype: str = "float32") -> Any:
        return self._convert(np.array(values, dtype))


def _rounded(x: Any, half: bool) -> Any:
    if not half:
        return x
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16)


Case = Callable[[Any, Inputs], Sequence[Any]]
CASES: dict[str, Case] = {}


def _case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def run(ops: Any, name: str, convert: Callable[[Any], Any], half: bool) -> list[Any]:
    """The arrays and numbers that a case makes, flat; None left out."""
    return _flat(CASES[name](ops, Inputs(name, convert, half)))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in _flat(item)]
    return [] if value is None else [value]


class Recorder:
    """gptcore.ops, remembering in ``used`` which of its names were asked for."""

    def __init__(self, ops: Any) -> None:
        self._ops, self.used = ops, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self._ops, name)


@_case
def layer_norm(ops: Any, a: Inputs) -> Sequence[Any]:
    x, residual, weight, bias, grad = (
        a.real(3, 5, 40),
        a.real(3, 5, 40),
        a.f32(40),
        a.f32(40),
        a.real(3, 5, 40),
    )
    y, h = ops.layer_norm(x, weight, bias, weight_offset=1.0, residual=residual)
    stats = ops.layer_norm_stats(h)
    gradients = ops.layer_norm_backward(grad, h, weight, stats, weight_offset=1.0, grad_h=grad)
    plain = ops.layer_norm(x), ops.layer_norm_backward(grad, x, None, ops.layer_norm_stats(x))
    given = ops.layer_norm(x, weight, bias, out=a.real(3, 5, 40))
    return y, h, stats, gradients, plain, given


@_case
def rms_norm(ops: Any, a: Inputs) -> Sequence[Any]:
    x, residual, weight, grad = a.real(3, 5, 40), a.real(3, 5, 40), a.f32(40), a.real(3, 5, 40)
    y, h = ops.rms_norm(x, weight, weight_offset=1.0, residual=residual)
    rstd = ops.rms_norm_stats(h)
    gradients = ops.rms_norm_backward(grad, h, weight, rstd, weight_offset=1.0, grad_h=grad)
    given = ops.rms_norm(x, weight, out=a.real(3, 5, 40))
    return y, h, rstd, gradients, ops.rms_norm(x), given


@_case
def activations(ops: Any, a: Inputs) -> Sequence[Any]:
    x, bias, grad = a.real(4, 3, 24), a.f32(24), a.real(4, 3, 24)
    exact = {"approximate": "none"}
    return (
        ops.gelu(x, bias), ops.gelu_backward(grad, x, bias), ops.gelu(x, **exact), ops.gelu_backward(grad, x, **exact),
        ops.silu(x, bias), ops.silu_backward(grad, x, bias), ops.relu(x, bias), ops.relu_backward(grad, x, bias),
        ops.silu(x, out=a.real(4, 3, 24)), ops.gated_activation_backward(grad, x, None, bias, None, 0),
    )  # fmt: skip


@_case
def gated_activations(ops: Any, a: Inputs) -> Sequence[Any]:
    fused, bias, gate_bias, up_bias, grad = (
        a.real(4, 3, 48),
        a.f32(48),
        a.f32(24),
        a.f32(24),
        a.real(4, 3, 24),
    )
    gate, up = fused[..., :24], fused[..., 24:]
    apart = (gate, up, gate_bias, up_bias)
    return (
        ops.swiglu(*apart), ops.swiglu_backward(grad, *apart),
        ops.swiglu(gate, up), ops.swiglu_backward(grad, gate, up),
        ops.geglu(*apart), ops.geglu_backward(grad, *apart), ops.geglu(gate, up, approximate="tanh"),
        ops.swiglu_packed(fused, bias), ops.swiglu_packed_backward(grad, fused, bias),
        ops.geglu_packed(fused, bias), ops.geglu_packed_backward(grad, fused, bias),
    )  # fmt: skip


@_case
def rotary(ops: Any, a: Inputs) -> Sequence[Any]:
    x, grad = a.real(2, 7, 3, 16), a.real(2, 7, 3, 16)
    cos, sin = ops.rotary_tables(32, 12, like=x)
    positions = a.integers(0, 32, 2, 7, dtype="int32")
    return (
        cos, sin, ops.rotary(x, cos, sin, position=5), ops.rotary(grad, cos, sin, position=5, inverse=True),
        ops.rotary(x, cos, sin, position=positions, interleaved=True),
    )  # fmt: skip


@_case
def embedding(ops: Any, a: Inputs) -> Sequence[Any]:
    ids, weight, grad = a.integers(0, 11, 3, 6), a.real(11, 20), a.real(3, 6, 20)
    added = ops.embedding_backward(ids, grad, 11, accumulate_into=a.f32(11, 20))
    return ops.embedding(ids, weight), ops.embedding_backward(ids, grad, 11), added


@_case
def attention(ops: Any, a: Inputs) -> Sequence[Any]:
    q, k, v, dout = a.real(2, 9, 4, 16), a.real(2, 13, 2, 16), a.real(2, 13, 2, 16), a.real(2, 9, 4, 16)
    options = {"causal": True, "window_size": (6, 0), "soft_cap": 4.0, "dropout_p": 0.25, "seed": 3}
    more = {"alibi_slopes": a.f32(4), "attn_bias": a.real(4, 9, 13), "sinks": a.f32(4)}
    mask = a.integers(0, 2, 9, 13, dtype="bool")
    out, lse = ops.attention(q, k, v, return_lse=True, **options, **more)
    dlse = a.f32(2, 4, 9)
    gradients = ops.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options, **more)
    lengths, sparse = a.of([3, 8], "int32"), {"causal": True, "sparse_stride": 4}
    more_out = (
        ops.attention(q, k, v, attn_mask=mask), ops.attention(q, k, v, causal=True, prefix_lengths=lengths),
        ops.attention(q, k, v, **sparse),
    )  # fmt: skip
    return out, lse, gradients, more_out


@_case
def attention_packed(ops: Any, a: Inputs) -> Sequence[Any]:
    q, k, v, dout = a.real(12, 4, 16), a.real(12, 2, 16), a.real(12, 2, 16), a.real(12, 4, 16)
    documents = a.of([0, 5, 12], "int32")
    out, lse = ops.attention(q, k, v, causal=True, cu_seqlens_q=documents, return_lse=True)
    return out, lse, ops.attention_backward(dout, q, k, v, out, lse, causal=True, cu_seqlens_q=documents)


@_case
def attention_paged(ops: Any, a: Inputs) -> Sequence[Any]:
    q, k, v = a.real(2, 3, 4, 16), a.real(5, 8, 2, 16), a.real(5, 8, 2, 16)
    cache = k, v, a.of([[4, 1], [0, 2]], "int32"), a.of([13, 7], "int32")
    options = {"causal": True, "window_size": (6, 0), "soft_cap": 4.0}
    more = {"alibi_slopes": a.f32(4), "sinks": a.f32(4)}
    return ops.attention_paged(q, *cache), ops.attention_paged(q, *cache, **options, **more, return_lse=True)


@_case
def attention_qkv(ops: Any, a: Inputs) -> Sequence[Any]:
    qkv, dout, documents = a.real(2, 9, 8 * 16), a.real(2, 9, 4 * 16), a.of([0, 5, 18], "int32")
    out, lse = ops.attention_qkv(qkv, 4, 2, causal=True, return_lse=True)
    dqkv = ops.attention_qkv_backward(dout, qkv, out, lse, 4, 2, causal=True)
    bias = {"attn_bias": a.f32(4, 9, 9), "sinks": a.f32(4)}
    biased, biased_lse = ops.attention_qkv(qkv, 4, 2, return_lse=True, **bias)
    gradients = ops.attention_qkv_backward(dout, qkv, biased, biased_lse, 4, 2, dlse=lse, **bias)
    flat, grad = qkv.reshape(18, 8 * 16), dout.reshape(18, 4 * 16)
    packed, packed_lse = ops.attention_qkv(flat, 4, 2, cu_seqlens_q=documents, return_lse=True)
    dflat = ops.attention_qkv_backward(grad, flat, packed, packed_lse, 4, 2, cu_seqlens_q=documents)
    return out, lse, dqkv, gradients, packed, dflat


@_case
def cross_entropy(ops: Any, a: Inputs) -> Sequence[Any]:
    logits, targets, weight = a.real(6, 33), a.of([3, 0, -100, 32, 7, 7], "int64"), a.f32(33)
    options = {"weight": weight, "label_smoothing": 0.1}
    each = ops.cross_entropy(logits, targets, reduction="none")
    return (
        ops.cross_entropy(logits, targets), ops.cross_entropy_backward(1.5, logits, targets),
        ops.cross_entropy(logits, targets, **options), ops.cross_entropy_backward(0.5, logits, targets, **options),
        each, ops.cross_entropy_backward(a.f32(6), logits, targets, reduction="none"),
    )  # fmt: skip


@_case
def linear_cross_entropy(ops: Any, a: Inputs) -> Sequence[Any]:
    x, weight, bias = a.real(2, 3, 20), a.real(33, 20), a.f32(33)
    targets = a.of([[3, 0, -100], [32, 7, 7]], "int64")
    options = {
        "z_loss": 1e-3, "label_smoothing": 0.1, "bias": bias, "token_weight": a.f32(2, 3), "logit_soft_cap": 5.0,
        "return_entropy": True, "return_predicted": True,
    }  # fmt: skip
    plain, full = (
        ops.linear_cross_entropy(x, weight, targets),
        ops.linear_cross_entropy(x, weight, targets, **options),
    )
    backward, main_grad = ops.linear_cross_entropy_backward, a.f32(33, 20)
    return (
        plain, backward(1.5, None, x, weight, targets, plain.lse),
        full, backward(0.5, 0.5, x, weight, targets, full.lse, **options),
        backward(1.5, None, x, weight, targets, plain.lse, main_grad=main_grad), main_grad,
    )  # fmt: skip


@_case
def token_logprobs(ops: Any, a: Inputs) -> Sequence[Any]:
    x, weight, bias = a.real(2, 3, 20), a.real(33, 20), a.f32(33)
    targets = a.of([[3, 0, -100], [32, 7, 7]], "int64")
    options = {"bias": bias, "logit_scale": 0.5}
    lse = ops.linear_cross_entropy(x, weight, targets, reduction="none", **options).lse
    logprobs = ops.token_logprobs(x, weight, targets, return_entropy=True, return_predicted=True, **options)
    return logprobs, ops.token_logprobs_backward(a.f32(2, 3), x, weight, targets, lse, **options)


@_case
def matmul(ops: Any, a: Inputs) -> Sequence[Any]:
    x, weight, grad = a.real(5, 48), a.real(17, 48), a.real(5, 17)
    dweight = ops.matmul(grad, x, transpose_a=True, accumulate=True, out=a.f32(17, 48))
    return ops.matmul(x, weight, transpose_b=True, bias=a.f32(17)), ops.matmul(grad, weight), dweight


@_case
def grouped_linear(ops: Any, a: Inputs) -> Sequence[Any]:
    x, weight, bias, grad = a.real(9, 40), a.real(3, 17, 40), a.f32(3, 17), a.real(9, 17)
    offsets = a.of([0, 2, 2, 8], "int32")
    gradients = ops.grouped_linear_backward(grad, x, weight, offsets, bias=bias)
    added = ops.grouped_linear_backward(grad, x, weight, offsets, out=a.f32(3, 17, 40), accumulate=True)
    given = ops.grouped_linear(x, weight, offsets, out=a.real(9, 17))
    return ops.grouped_linear(x, weight, offsets, bias=bias), gradients, added, given


@_case
def philox(ops: Any, a: Inputs) -> Sequence[Any]:
    counters = a.integers(-(2**31), 2**31, 9, 4, dtype="int32")
    return ops.philox(counters, 2**63 + 5), ops.philox(counters, -1, out=a.of(np.zeros((9, 4)), "int32"))


def _lists(a: Inputs, shapes: Sequence[tuple[int, ...]]) -> tuple[list[Any], list[Any], list[Any]]:
    """f32 parameters, gradients, bf16 copies."""
    return [a.f32(*s) for s in shapes], [a.real(*s) for s in shapes], [a.bf16(*s) for s in shapes]


def _zeros(a: Inputs, shapes: Sequence[tuple[int, ...]], dtype: str = "float32") -> list[Any]:
    return [a.of(np.zeros(s), dtype) for s in shapes]


_SHAPES = [(5, 8), (300,)]


@_case
def square_sums(ops: Any, a: Inputs) -> Sequence[Any]:
    return ops.square_sums([a.real(5, 8), a.real(300)], 16)


@_case
def grad_norm(ops: Any, a: Inputs) -> Sequence[Any]:
    return ops.grad_norm([a.real(5, 8), a.real(300)], 2.0), ops.grad_norm([a.of([np.inf])])[1]


@_case
def crc32c(ops: Any, a: Inputs) -> Sequence[Any]:
    x, out = a.f32(5, 8), a.of(np.zeros((5, 8)), "float32")
    return ops.crc32c(x), ops.crc32c(x, 7, out=out), out


@_case
def adamw(ops: Any, a: Inputs) -> Sequence[Any]:
    params, grads, copies = _lists(a, _SHAPES)
    m, v, largest = (_zeros(a, _SHAPES) for _ in range(3))
    steps = _zeros(a, [(), ()])
    settings = {"lr": 0.1, "weight_decay": 0.1, "max_norm": 1.0}
    norms = [
        ops.adamw_(
            params, grads, m, v, step=i, max_exp_avg_sqs=largest, copies=copies, steps=steps, **settings
        )
        for i in (1, 2)
    ]
    weights, lows, moments = [a.bf16(5, 8)], _zeros(a, [(5, 8)], "int16"), _zeros(a, [(5, 8), (5, 8)])
    ops.adamw_(weights, grads[:1], moments[:1], moments[1:], step=1, lows=lows, **settings)
    return norms, params, copies, m, v, largest, steps, weights, lows


@_case
def adamw_8bit(ops: Any, a: Inputs) -> Sequence[Any]:
    params, grads, copies = _lists(a, _SHAPES)
    codes = [_zeros(a, _SHAPES, "uint8") for _ in range(2)]
    scales = [_zeros(a, [(1,), (2,)]) for _ in range(2)]
    state = (codes[0], scales[0], codes[1], scales[1])
    norms = [ops.adamw_8bit_(params, grads, *state, step=i, lr=0.1, copies=copies) for i in (1, 2)]
    halves = [a.bf16(300)]
    ops.adamw_8bit_(halves, grads[1:], *(s[1:] for s in state), step=3, lr=0.1, seed=7)
    return norms, params, copies, codes, scales, halves


@_case
def sgd(ops: Any, a: Inputs) -> Sequence[Any]:
    params, grads, copies = _lists(a, _SHAPES)
    buffers = _zeros(a, _SHAPES)
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    norms = [ops.sgd_(params, grads, buffers, first=i == 0, copies=copies, **settings) for i in (0, 1)]
    return norms, params, buffers, copies, ops.sgd_(params, grads, lr=0.1, check_finite=False)[1]


@_case
def adafactor(ops: Any, a: Inputs) -> Sequence[Any]:
    params, grads, copies = _lists(a, _SHAPES)
    rows, columns, whole = a.of(np.zeros((5, 1))), a.of(np.zeros((1, 8))), a.of(np.zeros(300))
    averages = _zeros(a, _SHAPES)
    state = [rows, None], [columns, None], [None, whole]
    settings = {"step_size": 0.1, "beta2": 0.5, "exp_avgs": averages, "beta1": 0.9, "copies": copies}
    norms = [ops.adafactor_(params, grads, *state, **settings) for _ in range(2)]
    return norms, params, rows, columns, whole, averages, copies


@_case
def moe(ops: Any, a: Inputs) -> Sequence[Any]:
    logits, x, dout = a.real(40, 6), a.real(40, 16), a.real(40, 16)
    capacity = ops.expert_capacity(40, 6, factor=1.0, convention="per_assignment")
    routing = ops.moe_router(
        logits, capacity=capacity, priority=a.f32(40), second_choice="gshard", uniforms=a.f32(40)
    )
    place = routing.rows, routing.offsets
    y = ops.moe_dispatch(x, *place)
    out = ops.moe_combine(y, *place, routing.gates)
    dy, dgates = ops.moe_combine_backward(dout, y, *place, routing.gates)
    unread = ("gates", "offsets", "requested", "balance_loss", "z_loss", "entropy")
    read = routing._replace(**dict.fromkeys(unread))
    dlogits = ops.moe_router_backward(dgates, 1e-2, 1e-3, logits, read)
    return routing, y, out, dy, dgates, ops.moe_dispatch_backward(dy, routing.rows), dlogits
