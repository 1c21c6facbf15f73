"""Rotary frequencies, their stretching, and places in packed documents."""

from __future__ import annotations

import math

import pytest
import torch

from gptcore.models import ScalingSpec
from gptcore.models.positions import (
    alibi_slopes,
    document_positions,
    rotary_frequencies,
    rotary_tables,
)


def test_places_start_anew_in_each_document():
    cu_seqlens = torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32)
    assert document_positions(cu_seqlens, 8).tolist() == [0, 1, 2, 0, 1, 2, 3, 0]


def test_plain_frequencies():
    got = rotary_frequencies(8, 10000.0, ScalingSpec())
    assert got == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-12)


def test_linear_scaling_divides_positions():
    cos, sin = rotary_tables(32, 8, 10000.0, ScalingSpec(kind="linear", factor=4.0))
    plain_cos, plain_sin = rotary_tables(8, 8, 10000.0, ScalingSpec())
    torch.testing.assert_close(cos[::4], plain_cos)
    torch.testing.assert_close(sin[::4], plain_sin)


def test_llama3_scaling_keeps_short_and_divides_long_wavelengths():
    spec = ScalingSpec(kind="llama3", factor=8.0, original_context=8192)
    plain = rotary_frequencies(128, 5e5, ScalingSpec())
    got = rotary_frequencies(128, 5e5, spec)
    for before, after in zip(plain, got, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            assert after == pytest.approx(before, rel=1e-12)
        elif wavelength > 8192:
            assert after == pytest.approx(before / 8, rel=1e-12)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            assert after == pytest.approx((1 - smooth) * before / 8 + smooth * before, rel=1e-12)


def test_yarn_scaling():
    spec = ScalingSpec(kind="yarn", factor=16.0, original_context=4096)
    plain = rotary_frequencies(128, 1e4, ScalingSpec())
    got = rotary_frequencies(128, 1e4, spec)
    # by hand: 32 turns in 4096 tokens at index 20.95, one turn at 45.03; the ramp runs from 20 to 46
    assert got[:21] == pytest.approx(plain[:21], rel=1e-12)
    assert got[46:] == pytest.approx(plain[46:] / 16, rel=1e-12)
    assert got[33] == pytest.approx(plain[33] * (0.5 + 0.5 / 16), rel=1e-12)
    cos, _ = rotary_tables(4, 128, 1e4, spec)
    assert float(cos[0, 0]) == pytest.approx(0.1 * math.log(16) + 1, rel=1e-6)


def test_alibi_slopes():
    assert alibi_slopes(8) == [2.0**-k for k in range(1, 9)]
    # 12 heads: those of 8, then the 1st, 3rd, 5th and 7th of 16
    assert alibi_slopes(12) == [2.0**-k for k in range(1, 9)] + [2.0**-k for k in (0.5, 1.5, 2.5, 3.5)]
