"""torch, for what cannot do without it: where it is missing, one sentence says so."""

from __future__ import annotations

try:
    import torch
except ImportError as error:
    raise ImportError(
        f"this part of gptcore needs torch, which cannot be imported ({error}); "
        "gptcore.ops works without it, on NumPy and CuPy arrays",
        name="torch",
    ) from error

__all__ = ["torch"]
