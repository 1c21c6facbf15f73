"""gptcore on NumPy arrays: the same kernels, no torch in sight."""

from __future__ import annotations

import sys

import numpy as np

from gptcore import ops

rng = np.random.default_rng(0)
x = rng.standard_normal((2, 16, 64), dtype=np.float32)
weight, bias = np.ones(64, np.float32), np.zeros(64, np.float32)

y = ops.layer_norm(x, weight, bias)
print("layer_norm:", y.shape, y.dtype, f"mean {y.mean():+.1e}, deviation {y.std():.4f}")

q = k = v = y.reshape(2, 16, 4, 16)
out, lse = ops.attention(q, k, v, causal=True, return_lse=True)
print("attention:", out.shape, "log-sum-exp:", lse.shape)

stats = ops.layer_norm_stats(x)
dx, dweight, dbias = ops.layer_norm_backward(np.ones_like(y), x, weight, stats)
print("gradients:", dx.shape, dweight.shape, dbias.shape)

assert "torch" not in sys.modules
