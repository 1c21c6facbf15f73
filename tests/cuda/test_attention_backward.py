"""Attention's backward pass on CUDA: what its design asks of tests beyond tests/ops/test_attention*.py. The forward
pass is the float64 reference's, so that an error here is backward's own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gptcore import backend
from gptcore.ops.attention import attention, attention_backward, attention_reference, option_values
from tests.ops.attention_oracle import inputs
from tests.tolerance import same_bits

pytestmark = pytest.mark.skipif(
    "simt" not in backend.available_isas(), reason="wants the kernels run by the processor (tests/simt)"
)

# Largest error of a gradient, as a share of its largest value: P and dS are rounded to their type before the products,
# the result once more; f32's products are split, and their sums differ from float64's by some roundings.
BOUND = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def _exact(tensors: Any, grad: torch.Tensor, **options: Any) -> tuple[Any, Any, Any]:
    """out, lse and the gradients of q, k and v in float64."""
    leaves = [x.double().requires_grad_() for x in tensors]
    out, lse = attention_reference(*leaves, return_lse=True, **options)
    return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, grad.double())


def _check(tensors: Any, **options: Any) -> None:
    grad = torch.randn(tensors[0].shape).to(tensors[0].dtype)
    out, lse, exact = _exact(tensors, grad, **options)
    got = attention_backward(grad, *tensors, out.to(grad.dtype), lse.float(), **options)
    for name, a, b in zip("qkv", got, exact, strict=True):
        error = (a.double() - b).abs().max().item() / b.abs().max().item()
        assert error < BOUND[grad.dtype], f"gradient of {name}: error {error:.2e} of its largest"


# Every kernel there is, each with rows of tiles that end within one; T, S, H, Hkv, D.
SHAPES = [
    (70, 140, 2, 1, 24),
    (130, 150, 2, 2, 64),
    (70, 140, 2, 1, 96),
    (70, 150, 1, 1, 128),
    (65, 70, 1, 1, 160),
    (40, 70, 2, 1, 256),
]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_head_size(on_simt: None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = inputs(1, *shape, dtype)
    _check(tensors, causal=True)
    _check(tensors, causal=True, soft_cap=3.0, dropout_p=0.2, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drops_what_the_processor_drops(dtype: torch.dtype) -> None:
    tensors = inputs(2, 90, 150, 4, 2, 40, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 2**40 + 7, "offset": 3, "window_size": (60, 5)}
    out, lse = attention(*tensors, return_lse=True, **options)
    mine = attention_backward(grad, *tensors, out, lse, **options)
    before = backend.isa()
    backend.set_isa("simt")
    try:
        got = attention_backward(grad, *tensors, out, lse, **options)
    finally:
        backend.set_isa(before)
    for a, b in zip(got, mine, strict=True):
        # One probability dropped otherwise would be off by some percent of the largest gradient.
        assert (a.double() - b.double()).abs().max().item() < BOUND[dtype] * b.abs().max().item()


def _poisoned(tensors: Any, grad: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Gradients, dbias and dsinks included, written over NaN into rows that lie apart by more than they hold."""
    q, k, v = tensors
    out, lse, _ = _exact(tensors, grad, **options)
    cu_q, cu_k = (options.pop(f"cu_seqlens_{x}", None) for x in "qk")
    values = option_values("attention_backward", q, q.shape[-1], options)
    room = [torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan).to(x.dtype) for x in tensors]
    written = [x[..., 1:-2] for x in room]
    bias, sinks = (options.get(name) for name in ("attn_bias", "sinks"))
    more = [None if x is None else torch.full_like(x, torch.nan) for x in (bias, sinks)]
    backend.extension().attention_backward(
        grad, q, k, v, out.to(q.dtype), lse.float(), cu_q, cu_k, values, *written, None, *more,
    )  # fmt: skip
    for x in room:
        assert x[..., 0].isnan().all() and x[..., -2:].isnan().all(), "written beyond its rows"
    return [*written, *(x for x in more if x is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_gradient_is_written_whoever_sees_it(on_simt: None, dtype: torch.dtype) -> None:
    # The first queries see nothing, then the first keys are seen by none.
    for queries, keys, unseen, options in (
        (150, 70, (80, 0), {"causal": True}),
        (70, 300, (0, 210), {"causal": True, "window_size": (20, 0)}),
        (70, 90, (0, 0), {"attn_bias": torch.randn(2, 70, 90), "sinks": torch.randn(2), "causal": True}),
    ):
        tensors = inputs(1, queries, keys, 2, 1, 24, dtype)
        grad = torch.randn(tensors[0].shape).to(dtype)
        got = _poisoned(tensors, grad, **options)
        assert all(x.isfinite().all() for x in got)
        _, _, exact = _exact(tensors, grad, **options)
        for a, b, none in zip(got[:3], exact, (unseen[0], unseen[1], unseen[1]), strict=True):
            assert (a.double() - b).abs().max().item() < BOUND[dtype] * b.abs().max().item()
            assert not a[:, :none].any() and a[:, none + 1].any()


def test_lengths_that_decrease_keep_nobody_waiting(on_simt: None) -> None:
    # A tile of keys of the last document has no block, and the one before would wait for it.
    q, k, v = (torch.randn(n, 1, 40).bfloat16() for n in (300, 600, 600))
    cu_q, cu_k = torch.tensor([0, 100, 200, 300]).int(), torch.tensor([0, 500, 40, 600]).int()
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out, lse = attention(q, k, v, return_lse=True, **options)
    attention_backward(out, q, k, v, out, lse, **options)


def test_packed_documents_poisoned(on_simt: None) -> None:
    cu_q, cu_k = (
        torch.tensor([0, *np.cumsum(x)], dtype=torch.int32) for x in ([5, 0, 130, 1, 64], [9, 4, 130, 0, 20])
    )
    q, k, v = (torch.randn(n, h, 40).bfloat16() for n, h in ((200, 4), (163, 2), (163, 2)))
    grad = torch.randn(q.shape).bfloat16()
    got = _poisoned((q, k, v), grad, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True)
    assert all(x.isfinite().all() for x in got)
    for i in range(5):
        own_q, own_k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        if q[own_q].numel() * k[own_k].numel() == 0:
            assert not any(x.any() for x in (got[0][own_q], got[1][own_k], got[2][own_k]))
            continue
        alone = _poisoned([x[None] for x in (q[own_q], k[own_k], v[own_k])], grad[None, own_q], causal=True)
        for a, b in zip((got[0][own_q], got[1][own_k], got[2][own_k]), alone, strict=True):
            assert same_bits(a, b[0])


def _digest() -> str:
    """Of gradients whose dq takes more tiles of keys than the processor's GPU has multiprocessors."""
    torch.manual_seed(0)
    backend.set_isa("simt")
    found = hashlib.sha256()
    plain = inputs(1, 70, 600, 2, 1, 32, torch.bfloat16)
    capped = inputs(1, 40, 200, 2, 1, 24, torch.float32)
    for tensors, options in (
        (plain, {}),
        (plain, {"causal": True, "sinks": torch.randn(2)}),
        (capped, {"soft_cap": 2.0, "attn_bias": torch.randn(40, 200), "dropout_p": 0.1, "seed": 1}),
    ):
        grad = torch.randn(tensors[0].shape).to(tensors[0].dtype)
        out, lse, _ = _exact(tensors, grad, **options)
        for x in attention_backward(grad, *tensors, out.to(grad.dtype), lse.float(), **options):
            found.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_the_same_bits_in_whatever_order_threads_run() -> None:
    code = (
        "import os; from gptcore import backend; backend.attach_simt(os.environ['GPTCORE_SIMT']);"
        "from tests.cuda.test_attention_backward import _digest; print(_digest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "GPTCORE_SIMT_SEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "77")
    }  # fmt: skip
    assert len(digests) == 1


def test_not_a_number_stays_with_its_query(on_simt: None) -> None:
    # A query's NaN reaches its own gradient and those of the keys that it sees, but of no other query.
    q, k, v = inputs(1, 70, 70, 1, 1, 24, torch.float32)
    grad = torch.randn(q.shape)
    out, lse, _ = _exact((q, k, v), grad, causal=True)
    clean = attention_backward(grad, q, k, v, out.float(), lse.float(), causal=True)
    q[0, 50, 0, 3] = torch.nan
    got = attention_backward(grad, q, k, v, out.float(), lse.float(), causal=True)
    assert same_bits(got[0][:, :50], clean[0][:, :50]) and got[0][:, 50].isnan().all()
    assert same_bits(got[0][:, 51:], clean[0][:, 51:])
    assert got[1][:, :51].isnan().all()


# --- tiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 32, 33, 64, 96, 128, 129, 192, 256])
@pytest.mark.parametrize("modified", [False, True])
def test_tiles_fit_every_device(simt: ModuleType, element: int, head_dim: int, modified: bool) -> None:
    head = simt.backward_head(modified or element == 4, head_dim)
    assert head_dim <= head <= 256 and head % 32 == 0
    for limit in (163 << 10, 227 << 10):
        tiles = simt.backward_tiles(element, head, modified, limit)
        assert tiles["shared_bytes"] <= limit
        # Rows of 16-byte chunks, an odd number: eight of them lie in different banks.
        for pitch, least in ((tiles["head_pitch"], head), (tiles["score_pitch"], tiles["keys"])):
            assert pitch >= least and pitch * element // 16 % 2 == 1
        # Warps take whole fragments.
        assert tiles["queries"] % 32 == 0 and tiles["keys"] % 32 == 0
        assert tiles["keys"] % (16 * tiles["key_warps"]) == 0 and head * tiles["key_warps"] % 64 == 0
        # Sums of dk and dv leave a thread half of its 255 registers.
        assert 2 * tiles["keys"] * head // 256 <= 128


def test_queries_arrive_ahead_where_memory_allows(simt: ModuleType) -> None:
    stages = {
        (head, limit): simt.backward_tiles(2, head, False, limit << 10)["stages"]
        for head in (32, 64, 96, 128, 192, 256) for limit in (163, 227)
    }  # fmt: skip
    assert all(stages[head, 227] == 2 for head in (32, 64, 96, 128, 192, 256))
    assert [stages[head, 163] for head in (32, 64, 96, 128, 192, 256)] == [2, 2, 2, 1, 1, 1]
