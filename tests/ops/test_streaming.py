"""Large results go past the caches: the same bits as where they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gptcore import ops
from gptcore.ops import gated_activation as activation
from gptcore.ops.rotary import rotary, rotary_tables
from tests.tolerance import same_bits

WIDTH = 1536
ROWS = {torch.float32: 2800, torch.bfloat16: 5600}  # 16.4 MiB, just above the limit of core/stream.h
COS, SIN = rotary_tables(5600, 128)


def _rotary(x: torch.Tensor, first: int, out: torch.Tensor) -> None:
    heads = (*x.shape[:-1], WIDTH // 128, 128)
    rotary(x.view(heads), COS, SIN, position=first, out=out.view(heads))


OPS: dict[str, Callable[[torch.Tensor, int, torch.Tensor], object]] = {
    "gelu": lambda x, _, out: activation.gelu(x, out=out),
    "swiglu": lambda x, _, out: activation.swiglu(x, x, out=out),
    "rotary": _rotary,
    "embedding": lambda x, _, out: ops.embedding(torch.arange(len(x)), x, out=out),
    "layer_norm": lambda x, _, out: ops.layer_norm(x, out=out),
    "rms_norm": lambda x, _, out: ops.rms_norm(x, out=out),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_large_results_equal_small_ones(isa: str, name: str, dtype: torch.dtype) -> None:
    rows = ROWS[dtype]
    x = torch.randn(rows, WIDTH).to(dtype)
    small = torch.empty_like(x)
    for first in range(0, rows, 1400):
        OPS[name](x[first : first + 1400], first, small[first : first + 1400])
    # Memory that was written before is streamed to, fresh memory is not, nor is what starts within a line.
    for large in (torch.ones_like(x), torch.empty(64 << 20, dtype=dtype)[: x.numel()].view_as(x)):
        OPS[name](x, 0, large)
        assert same_bits(large, small)
    shifted = torch.ones(x.numel() + 1, dtype=dtype)[1:].view_as(x)
    OPS[name](x, 0, shifted)
    assert same_bits(shifted, small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_large_gradients_equal_small_ones(isa: str, gated: bool, dtype: torch.dtype) -> None:
    from gptcore.backend import extension

    rows = ROWS[dtype]
    grad, x, up = (torch.randn(rows, WIDTH).to(dtype) for _ in range(3))

    def gradients(chosen: slice) -> list[torch.Tensor]:
        part = [t[chosen] for t in (grad, x, up)]
        out = [torch.ones_like(part[0]) for _ in range(2 if gated else 1)]
        optional = (part[2], None, None, out[0], out[1]) if gated else (None, None, None, out[0], None)
        extension().gated_activation_backward(activation.SILU, part[0], part[1], *optional, None, None)
        return out

    large = gradients(slice(None))
    parts = [gradients(slice(first, first + 1400)) for first in range(0, rows, 1400)]
    for got, pieces in zip(large, zip(*parts, strict=True), strict=True):
        assert same_bits(got, torch.cat(pieces))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_table_gets_the_same_gradient_as_by_accumulation(isa: str, dtype: torch.dtype) -> None:
    from gptcore.backend import extension

    rows, tokens = (66 << 20) // (WIDTH * dtype.itemsize), 2000  # above the limit for zeros of core/stream.h
    ids = torch.randint(0, rows, (tokens,)).clamp(max=rows - rows // 20)  # one of them some hundred times
    grad = torch.randn(tokens, WIDTH).to(dtype)
    added, written = torch.zeros(rows, WIDTH, dtype=dtype), torch.ones(rows, WIDTH, dtype=dtype)
    extension().embedding_backward(ids, grad, added, True)
    extension().embedding_backward(ids, grad, written, False)
    assert same_bits(written, added)
