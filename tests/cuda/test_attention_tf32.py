"""f32 attention on CUDA with plain tf32 products, which somebody has to ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptcore import backend
from gptcore.ops.attention import attention, attention_backward
from tests.cuda.attention_cases import inputs

HALF_STEP = 2.0**-11  # of 11 significant bits, relative
SUMS = 2.0**-17  # what f32 sums and approximate exponentials add to all of this, relative


@pytest.fixture
def tf32(on_simt: None) -> Iterator[None]:
    backend.set_fp32_precision("tf32")
    yield
    backend.set_fp32_precision("ieee")


class Exact:
    """One head in float64, and what operands that are off by HALF_STEP may do to each result."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> None:
        both = 2 * HALF_STEP
        scale = q.shape[1] ** -0.5
        hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(1 + k.shape[0] - q.shape[0])
        scores = (scale * q @ k.T).masked_fill(hidden, -torch.inf)
        p = scores.softmax(1)
        # A score is off by so much and the row's sum by as much as its worst, so a probability by twice that.
        worst = (both * scale * q.abs() @ k.abs().T).masked_fill(hidden, 0.0).amax(1, keepdim=True)
        p_off = p * 2 * worst
        self.out, self.out_off = p @ v, p_off @ v.abs() + both * p @ v.abs()
        self.dv, self.dv_off = p.T @ dout, (p_off + both * p).T @ dout.abs()
        dp, delta = dout @ v.T, (dout * self.out).sum(1, keepdim=True)
        ds = p * (dp - delta)
        delta_off = (dout.abs() * self.out_off).sum(1, keepdim=True)
        ds_off = p * (both * dout.abs() @ v.abs().T + delta_off) + p_off * (dp - delta).abs()
        self.dq, self.dq_off = scale * ds @ k, scale * (ds_off + both * ds.abs()) @ k.abs()
        self.dk, self.dk_off = scale * ds.T @ q, scale * (ds_off + both * ds.abs()).T @ q.abs()

    def check(self, name: str, got: torch.Tensor) -> bool:
        """Within its bound; says whether it is further off than f32 sums are."""
        exact, off = getattr(self, name), getattr(self, f"{name}_off")
        error = (got.double() - exact).abs()
        floor = SUMS * exact.abs().max()
        assert (error <= off + floor).all(), (name, float((error / (off + floor)).max()))
        return bool(error.max() > floor)


@pytest.mark.parametrize("size", [32, 40, 128, 200])
def test_products_are_those_of_11_bits(size: int, tf32: None) -> None:
    q, k, v = inputs((2, 35, 50, 2, 1, size), torch.float32)
    dout = torch.randn_like(q)
    out, lse = attention(q, k, v, causal=True, return_lse=True, out=torch.full_like(q, torch.nan))
    assert torch.equal(out, attention(q, k, v, causal=True))
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, causal=True)
    rounded = set()
    for sequence in range(2):
        heads = [
            Exact(*(x[sequence, :, h if x is q or x is dout else 0].double() for x in (q, k, v, dout)))
            for h in range(2)
        ]
        for h, exact in enumerate(heads):
            rounded |= {
                name for name, x in (("out", out), ("dq", dq)) if exact.check(name, x[sequence, :, h])
            }
        for name, x in (("dk", dk), ("dv", dv)):
            one, other = heads
            setattr(one, name, getattr(one, name) + getattr(other, name))
            setattr(one, f"{name}_off", getattr(one, f"{name}_off") + getattr(other, f"{name}_off"))
            rounded |= {name} if one.check(name, x[sequence, :, 0]) else set()
    assert rounded == {"out", "dq", "dk", "dv"}


def test_the_processor_multiplies_as_ever(tf32: None) -> None:
    backend.set_isa("v3")
    q, k, v = inputs((1, 40, 40, 2, 1, 32), torch.float32)
    out = attention(q, k, v)
    backend.set_fp32_precision("ieee")
    assert torch.equal(attention(q, k, v), out)


def test_other_names_are_refused() -> None:
    assert backend.fp32_precision() == "ieee"
    with pytest.raises(ValueError, match="got 'high', expected 'ieee' or 'tf32'"):
        backend.set_fp32_precision("high")
