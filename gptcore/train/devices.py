"""Accelerators by name, and what a run costs on them."""

from __future__ import annotations

from typing import NamedTuple

from gptcore.errors import UserError, unknown_name

HOURS_PER_YEAR = 365.25 * 24


class Device(NamedTuple):
    """``memory`` in bytes, as sold; ``peak`` dense FLOP/s in half precision (bf16; V100, which lacks it, fp16)."""

    name: str
    memory: float
    peak: float


# NVIDIA's data sheets; of the figures "with sparsity" half.
DEVICES = {
    device.name: device
    for device in (
        Device("V100", 32e9, 125e12),  # Tesla V100 SXM2 32 GB: tensor performance
        Device("A100-40", 40e9, 312e12),  # A100 Tensor Core GPU, SXM
        Device("A100-80", 80e9, 312e12),
        Device("H100", 80e9, 989.4e12),  # H100 SXM5, 1,978.9 with sparsity
        Device("H200", 141e9, 989.4e12),
        Device("B200", 180e9, 2250e12),  # DGX B200: 1,440 GB and 36 PFLOP/s with sparsity over 8
    )
}


def device(name: str) -> Device:
    """The device of this name, in any case; an unknown one is refused with the nearest."""
    for known, found in DEVICES.items():
        if known.lower() == name.lower():
            return found
    raise unknown_name("device", name, DEVICES)


class Cost(NamedTuple):
    """Of a run: ``hours`` by the clock, ``device_hours``, ``cost`` in the currency of the price, None without one."""

    hours: float
    device_hours: float
    cost: float | None

    @property
    def device_years(self) -> float:
        return self.device_hours / HOURS_PER_YEAR


def cost(flops: float, flops_per_s: float, devices: int, price: float | None = None) -> Cost:
    """Of ``flops`` on ``devices``, each of which does ``flops_per_s``, at ``price`` an hour and device.

    Raises:
        UserError: a speed that is not above 0, or a negative price.
    """
    if not flops_per_s > 0:
        raise UserError(f"the speed of a device: expected FLOP/s above 0, got {flops_per_s}")
    if price is not None and not price >= 0:
        raise UserError(f"--price: expected 0 or more, got {price}")
    device_hours = flops / flops_per_s / 3600
    return Cost(device_hours / devices, device_hours, None if price is None else device_hours * price)
