"""What the tests of attention's forward on CUDA share: inputs of every type, and the float64 reference."""

from __future__ import annotations

from typing import Any

import torch

from gptcore.ops.attention import attention, attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of what the output is rounded to, and for 16 bits of the probabilities too.
STEP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    batch, queries, keys, heads, kv_heads, size = shape
    q = torch.randn(batch, queries, heads, size).to(dtype)
    return [q, *(torch.randn(batch, keys, kv_heads, size).to(dtype) for _ in range(2))]


def check_forward(tensors: list[torch.Tensor], *, scores: float = 0.0, **options: Any) -> None:
    """Output and lse into poisoned memory, against float64; f32 scores are as large as ``scores``, and off as that."""
    dtype = tensors[0].dtype
    out = torch.full_like(tensors[0], torch.nan)
    got, lse = attention(*tensors, **options, return_lse=True, out=out)
    exact, exact_lse = attention_reference(*(x.double() for x in tensors), **options, return_lse=True)
    scale = tensors[2].double().abs().max().item() / (1 - options.get("dropout_p", 0.0))
    assert (got.double() - exact).abs().max().item() <= (STEP[dtype] + 2.0**-22 * scores) * scale
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    if seen.any():
        assert (lse[seen].double() - exact_lse[seen]).abs().max().item() <= 2e-5 * max(
            1.0, exact_lse[seen].abs().max().item()
        )
