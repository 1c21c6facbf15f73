"""The speed that model FLOP/s are held against, and where that number is from."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """FLOP/s of a device in a dtype, None when unknown, and a name that says what the number is; ``product`` is what a
    large product was measured to reach, where the peak is a data sheet's."""

    flops_per_s: float | None
    name: str
    product: float | None = None

    def __str__(self) -> str:
        if self.flops_per_s is None:
            return f"peak unknown ({self.name})"
        measured = "" if self.product is None else f"; a product reaches {self.product / 1e12:.3g}"
        return f"peak {self.flops_per_s / 1e12:.3g} TFLOP/s ({self.name}{measured})"


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
    """The peak of ``device`` in ``dtype``: measured (about a second), of known GPUs looked up beside that."""
    if device.type == "cpu":
        return measure_cpu(dtype)
    if device.type != "cuda":
        return Peak(None, f"{device.type}, {str(dtype).removeprefix('torch.')}")
    return beside_data_sheet(torch.cuda.get_device_name(device), dtype, measure_cuda(device, dtype))


def beside_data_sheet(name: str, dtype: torch.dtype, product: float) -> Peak:
    """The peak of the GPU ``name``, on which a product reached ``product`` FLOP/s."""
    if dtype == torch.bfloat16 and name in _BF16_DATA_SHEET:
        return Peak(_BF16_DATA_SHEET[name], f"{name}, data sheet, dense bf16", product)
    return Peak(product, f"{name}, measured, {str(dtype).removeprefix('torch.')} product")


def measure_cuda(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.8) -> float:
    """FLOP/s of the best run of square products, by the device's own clock; in f32 as torch is set to multiply it."""
    n, times = (8192 if dtype == torch.bfloat16 else 4096), 4
    operand = _operand(n, dtype, device)
    out = torch.empty_like(operand)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:  # the first run, which also chooses the algorithm, is not the best
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        stream = torch.cuda.current_stream(device)
        events[0].record(stream)
        for _ in range(times):
            torch.mm(operand, operand, out=out)
        events[1].record(stream)
        events[1].synchronize()
        best = min(best, events[0].elapsed_time(events[1]) / 1e3 / times)
    return 2.0 * n**3 / best


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


def _operand(n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Values of both signs and many bit patterns: a product of zeros draws less power and clocks higher."""
    return torch.arange(n * n, dtype=torch.float32, device=device).sin_().reshape(n, n).to(dtype)


class _Product:
    """An n³ product into memory of its own, warmed up once."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.operand = _operand(n, dtype)
        self.out = torch.empty_like(self.operand)
        self.seconds()

    def seconds(self) -> float:
        start = time.perf_counter()
        torch.mm(self.operand, self.operand, out=self.out)
        return time.perf_counter() - start
