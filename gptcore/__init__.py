"""gptcore: a native engine for GPTs with a thin Python face.

``import gptcore`` does no work: neither torch nor NumPy nor the extension is loaded until something
is used. Submodules (``gptcore.ops``, ``gptcore.functional``, ``gptcore.nn``, ...) load on first access.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = frozenset(
    {
        "backend", "checkpoint", "cli", "data", "dist", "errors", "functional", "infer", "integrations", "models", "nn",
        "ops", "optim", "report", "train",
    }
)  # fmt: skip

# Names of submodules that many programs want at hand.
_SHORTCUTS = {
    "from_hf": "checkpoint", "to_hf": "checkpoint", "replace": "integrations", "restore": "integrations",
}  # fmt: skip

__all__ = ["__version__", *sorted(_SUBMODULES), *_SHORTCUTS]


def _fix_product_bits() -> None:
    """Ask MKL for the same bits at every thread count, which it decides when torch loads it.

    ``STRICT`` costs no speed at the sizes that matter; without it f32 products change their last bits
    with the number of threads. A value the user has set stays.
    """
    if "torch" in sys.modules or "MKL_CBWR" in os.environ:
        return
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        flags = ""
    os.environ["MKL_CBWR"] = "AVX512,STRICT" if " avx512f" in flags else "AVX2,STRICT"


_fix_product_bits()


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"gptcore.{name}")
    if name in _SHORTCUTS:
        return getattr(importlib.import_module(f"gptcore.{_SHORTCUTS[name]}"), name)
    raise AttributeError(f"module 'gptcore' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_SHORTCUTS})
