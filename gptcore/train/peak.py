"""The speed that model FLOP/s are held against, and where that number is from."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """FLOP/s of a device in a dtype, None when unknown, and a name that says what the number is."""

    flops_per_s: float | None
    name: str

    def __str__(self) -> str:
        if self.flops_per_s is None:
            return f"peak unknown ({self.name})"
        return f"peak {self.flops_per_s / 1e12:.3g} TFLOP/s ({self.name})"


# Dense bf16 tensor-core FLOP/s from NVIDIA's data sheets (half of the figures printed "with sparsity"), by
# the exact name the driver reports: a wrong guess is worse than none.
_BF16_DATA_SHEET = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}


def of(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of ``device`` in ``dtype``: measured on a CPU (about a second), looked up on a GPU."""
    if device.type == "cpu":
        return measure_cpu(dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if dtype == torch.bfloat16 and name in _BF16_DATA_SHEET:
        return Peak(_BF16_DATA_SHEET[name], f"{name}, data sheet, dense bf16")
    return Peak(None, f"{name}, {str(dtype).removeprefix('torch.')}")


def measure_cpu(dtype: torch.dtype, *, seconds: float = 0.8, size: int = 2048) -> Peak:
    """The best of the square products that fit in ``seconds``, on the threads in use.

    A processor without bf16 units may need seconds for one product of ``size``, so the size grows to it
    from 256 and stops where one product takes a fifth of the time given.
    """
    n = 256
    best = _Product(n, dtype).seconds()
    while n < size and 8 * best < seconds / 5:
        n *= 2
        best = _Product(n, dtype).seconds()
    product = _Product(n, dtype)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, product.seconds())
    threads = torch.get_num_threads()
    name = f"measured, {n}³ {str(dtype).removeprefix('torch.')} product, {threads} threads"
    return Peak(2.0 * n**3 / best, name)


class _Product:
    """An n³ product into memory of its own, warmed up once."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        # Values of both signs and many bit patterns: a product of zeros draws less power and clocks higher.
        self.operand = torch.arange(n * n, dtype=torch.float32).sin_().reshape(n, n).to(dtype)
        self.out = torch.empty_like(self.operand)
        self.seconds()

    def seconds(self) -> float:
        start = time.perf_counter()
        torch.mm(self.operand, self.operand, out=self.out)
        return time.perf_counter() - start
