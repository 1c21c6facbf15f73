"""One call of every op that has CUDA kernels, forward and backward, for properties that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore import ops


@dataclass(frozen=True)
class OpCase:
    """inputs: dtype -> tensors on the CPU, drawn anew in each call; run: those, on any device -> results.

    ``run`` may write to its inputs. ``terms`` is the longest sum in it.
    """

    name: str
    inputs: Callable[[torch.dtype], list[Tensor]]
    run: Callable[[list[Tensor]], Sequence[Tensor]]
    terms: int
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def __str__(self) -> str:
        return self.name


def _with_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results of ``function`` and gradients of all floating inputs for a gradient of ones of each result."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    tracked = [o for o in outs if o.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(tracked, wanted, [torch.ones_like(o) for o in tracked], allow_unused=True)
    return [*(o.detach() for o in outs), *(g for g in gradients if g is not None)]


def _case(name: str, function: Callable[..., Any], shapes: Sequence[tuple[int, ...]], terms: int) -> OpCase:
    def inputs(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape).to(dtype) for shape in shapes]

    return OpCase(name, inputs, lambda tensors: _with_gradients(function, tensors), terms)


def _attention(name: str, shape: tuple[int, int, int, int, int, int], **options: Any) -> OpCase:
    b, t, s, h, kv, d = shape
    shapes = [(b, t, h, d), (b, s, kv, d), (b, s, kv, d)]
    return _case(f"attention_{name}", lambda q, k, v: ops.attention(q, k, v, **options), shapes, max(s, d))


def _paged_inputs(dtype: torch.dtype) -> list[Tensor]:
    pages = [torch.randn(40, 16, 2, 64).to(dtype) for _ in range(2)]
    table = torch.randperm(40).int()[:36].view(2, 18)
    return [torch.randn(2, 2, 4, 64).to(dtype), *pages, table, torch.tensor([270, 33], dtype=torch.int32)]


def _documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu = torch.arange(0, len(q) + 1, 70, dtype=torch.int32, device=q.device)
    return ops.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)


def _rotary(x: Tensor) -> Tensor:
    cos, sin = ops.rotary_tables(x.shape[1], x.shape[3], like=x)
    return ops.rotary(x, cos, sin)


def _classes(count: int, classes: int) -> Tensor:
    targets = torch.randint(0, classes, (count,))
    targets[::7] = -100
    return targets


def _losses(name: str, function: Callable[..., Any], *shapes: tuple[int, ...], classes: int) -> OpCase:
    def inputs(dtype: torch.dtype) -> list[Tensor]:
        tensors = [(torch.randn(shape) * shape[-1] ** -0.5).to(dtype) for shape in shapes]
        return [*tensors, _classes(shapes[0][0], classes)]

    return OpCase(name, inputs, lambda tensors: _with_gradients(function, tensors), classes)


def _embedding_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(50, 33).to(dtype), torch.randint(0, 50, (3, 40))]


def _routed(logits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """A mixture of linear experts: router, dispatch, grouped products, combination."""
    routing = ops.moe_router(logits.float(), top_k=2)
    sorted_rows = ops.moe_dispatch(x, routing.rows, routing.offsets)
    y = ops.grouped_linear(sorted_rows, weight, routing.offsets)
    out = ops.moe_combine(y, routing.rows, routing.offsets, routing.gates)
    return out, routing.balance_loss, routing.z_loss


SIZES = ((300,), (65, 33), (7,), (1,))


def _optimizer(name: str, step: Callable[..., Any], states: int) -> OpCase:
    """Two updates of parameters of odd sizes; results are all that was written."""

    def inputs(dtype: torch.dtype) -> list[Tensor]:
        params = [torch.randn(size) for size in SIZES]
        grads = [torch.randn(size).to(dtype) for size in SIZES]
        return params + grads

    def run(tensors: list[Tensor]) -> list[Tensor]:
        params = [p.clone() for p in tensors[: len(SIZES)]]
        grads = tensors[len(SIZES) :]
        kept = [[torch.zeros_like(p) for p in params] for _ in range(states)]
        for number in (1, 2):
            step(params, grads, *kept, number)
        return [*params, *(s for state in kept for s in state)]

    return OpCase(name, inputs, run, 1)


def _adamw(params: Any, grads: Any, m: Any, v: Any, number: int) -> None:
    ops.adamw_(params, grads, m, v, step=number, lr=1e-2, weight_decay=0.1, max_norm=1.0)


def _sgd(params: Any, grads: Any, buffers: Any, number: int) -> None:
    ops.sgd_(params, grads, buffers, lr=1e-2, momentum=0.9, first=number == 1)


CASES = [
    _case("layer_norm", ops.layer_norm, [(5, 130), (130,), (130,)], 130),
    _case("layer_norm_wide", ops.layer_norm, [(3, 9000), (9000,), (9000,)], 9000),
    _case("rms_norm", ops.rms_norm, [(5, 130), (130,)], 130),
    _case("swiglu", ops.swiglu, [(9, 70), (9, 70)], 1),
    _case("gelu_bias", ops.gelu, [(9, 70), (70,)], 9),
    _case("rotary", _rotary, [(2, 9, 3, 32)], 1),
    OpCase(
        "embedding", _embedding_inputs,
        lambda tensors: _with_gradients(lambda w, ids: ops.embedding(ids, w), tensors), 120,
    ),
    _losses("cross_entropy", lambda x, t: ops.cross_entropy(x, t), (40, 301), classes=301),
    _losses(
        "linear_cross_entropy", lambda x, w, t: ops.linear_cross_entropy(x, w, t, label_smoothing=0.1)[0],
        (40, 24), (301, 24), classes=301,
    ),
    _attention("causal", (2, 70, 70, 4, 2, 64), causal=True),
    _attention("full_odd", (1, 33, 95, 2, 2, 40)),
    _attention("window_soft_cap", (1, 80, 80, 2, 1, 128), causal=True, window_size=(16, 0), soft_cap=5.0),
    _attention("dropout", (2, 40, 40, 2, 2, 64), causal=True, dropout_p=0.2, seed=7),
    OpCase(
        "attention_paged", _paged_inputs,
        lambda inputs: ops.attention_paged(*inputs, causal=True, return_lse=True), 270,
    ),
    _case("attention_documents", _documents, [(140, 4, 128), (140, 2, 128), (140, 2, 128)], 128),
    _case("mixture", _routed, [(60, 6), (60, 32), (6, 40, 32)], 60),
    _optimizer("adamw", _adamw, 2),
    _optimizer("sgd", _sgd, 1),
    OpCase(
        "grad_norm", lambda dtype: [torch.randn(size).to(dtype) for size in SIZES],
        lambda tensors: [torch.as_tensor(ops.grad_norm(tensors)[0])], 2500,
    ),
]  # fmt: skip
