"""From text to batches: corpora, tokenizers, token shards, packing and the loader.

``corpus`` reads documents, ``tokenizer`` turns them into ids, ``shards`` keeps the ids in checksummed
memory-mapped files, ``loader`` serves batches that are a pure function of (seed, step), and ``prepare``
runs the way from the first to the third. Importing this package imports none of them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_SUBMODULES = frozenset(
    {
        "atomic",
        "chat",
        "chat_template",
        "corpus",
        "dataset",
        "examples",
        "loader",
        "packing",
        "permutation",
        "prepare",
        "record_files",
        "records",
        "shards",
        "tokenizer",
    }
)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"gptcore.data.{name}")
    raise AttributeError(f"module 'gptcore.data' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
