"""The same functions on CuPy arrays, where there is a GPU: arrays in, arrays out, no torch in sight."""

from __future__ import annotations

try:
    import cupy

    cupy.cuda.runtime.getDeviceCount()
except Exception as error:  # no package, no driver, no device
    print(f"needs CuPy and a GPU ({type(error).__name__}); nothing to show here")
    raise SystemExit from None

from gptcore import ops

x = cupy.random.default_rng(0).standard_normal((4, 768), dtype=cupy.float32)
weight = cupy.ones(768, dtype=cupy.float32)
try:
    y = ops.rms_norm(x, weight)
except ValueError as error:  # an op without a CUDA kernel says so
    print(error)
    raise SystemExit from None
expected = x / cupy.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
print("rms_norm:", type(y).__name__, y.shape, "largest difference", float(abs(y - expected).max()))
