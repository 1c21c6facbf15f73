"""What a run shows: progress on the terminal, plots, pages. Imports nothing heavy by itself."""

from __future__ import annotations

import importlib
from types import ModuleType

_SUBMODULES = frozenset({"html", "plot", "progress"})


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"gptcore.report.{name}")
    raise AttributeError(f"module 'gptcore.report' has no attribute '{name}'")
