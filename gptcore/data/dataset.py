"""Several shards as one data set: the same tokenizer, one count of tokens, windows over all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gptcore.data.packing import segment_starts
from gptcore.data.shards import ArrayShard, TokenShard
from gptcore.data.tokenizer import require_same
from gptcore.errors import UserError, unknown_name

MANIFEST = "manifest.json"


class Shard(Protocol):
    """What the loader asks of a shard; see ``TokenShard`` (a file) and ``ArrayShard`` (memory)."""

    tokens: int
    documents: int
    vocab_size: int
    eot: int | None
    text_bytes: int
    fingerprint: str
    document_ends: np.ndarray
    token_bytes: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray: ...


class TokenDataset:
    """Shards of one tokenizer, in the order given.

    ``tokens``, ``documents``, ``text_bytes`` are sums; ``vocab_size``, ``eot``, ``fingerprint`` and
    ``token_bytes`` are what all shards share. Raises ``UserError`` when there is none or they differ.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise UserError("a data set needs at least one token shard, got none")
        first = shards[0]
        for shard in shards[1:]:
            require_same(first.fingerprint, _name(first), shard.fingerprint, _name(shard))
            if (shard.vocab_size, shard.eot) != (first.vocab_size, first.eot):
                raise UserError(f"{_name(shard)}: another vocabulary than {_name(first)}")
        self.shards = list(shards)
        self.tokens = sum(shard.tokens for shard in shards)
        self.documents = sum(shard.documents for shard in shards)
        self.text_bytes = sum(shard.text_bytes for shard in shards)
        self.vocab_size = first.vocab_size
        self.eot = first.eot
        self.fingerprint = first.fingerprint
        self.token_bytes = np.asarray(first.token_bytes)

    @classmethod
    def open(
        cls, paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], split: str = "train"
    ) -> TokenDataset:
        """The shards of one ``split`` of a directory that ``prepare`` wrote, or the shard files given."""
        if not isinstance(paths, (str, os.PathLike)):
            return cls([TokenShard(path) for path in paths])
        path = Path(paths)
        if path.is_dir():
            return cls([TokenShard(path / name) for name in read_manifest(path, split)])
        return cls([TokenShard(path)])

    @classmethod
    def from_array(cls, ids: Any, **options: Any) -> TokenDataset:
        """Ids in memory; ``options`` as in ``ArrayShard``."""
        return cls([ArrayShard(ids, **options)])

    def __repr__(self) -> str:
        return (
            f"<TokenDataset: {self.tokens:,} tokens, {len(self.shards)} shards, vocabulary {self.vocab_size}>"
        )


def read_manifest(directory: Path, split: str) -> list[str]:
    """The names of the shards of ``split`` in a directory that ``prepare`` wrote."""
    path = directory / MANIFEST
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        names = {name: [str(shard["file"]) for shard in entry["shards"]] for name, entry in splits.items()}
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no prepared data here (no {MANIFEST}); make it with 'gptcore prepare'"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged manifest ({error}); prepare the data again") from None
    if split not in names:
        raise unknown_name("split", split, names)
    return names[split]


def _name(shard: Shard) -> str:
    return str(getattr(shard, "path", "an array"))


class Windows:
    """The places of a data set where a row of ``length`` inputs and targets can begin.

    ``stride=length`` lays them side by side, ``stride=1`` takes every position. No window crosses from
    one shard into the next. ``count`` of them; raises ``UserError`` when there is none.
    """

    def __init__(self, data: TokenDataset, length: int, stride: int) -> None:
        if length < 1:
            raise UserError(f"length: got {length}, expected at least 1")
        self.data = data
        self.length = length
        self.stride = stride
        # A row shows length + 1 tokens: each input's target is the next one.
        counts = [max(0, (shard.tokens - 1 - length) // stride + 1) for shard in data.shards]
        self._ends = np.cumsum(counts)
        self.count = int(self._ends[-1])
        if not self.count:
            longest = max(shard.tokens for shard in data.shards)
            raise UserError(
                f"the data has {longest} tokens, a row of length {length} needs {length + 1}; use less"
            )

    def locate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the first token of each window, two (N,) int64 arrays."""
        shards = np.searchsorted(self._ends, windows, side="right")
        before = np.where(shards > 0, self._ends[shards - 1], 0)
        return shards, (windows - before) * self.stride

    def rows(self, windows: np.ndarray) -> np.ndarray:
        """The tokens of each window and one more, (N, length + 1) int64."""
        out = np.empty((len(windows), self.length + 1), np.int64)
        for row, shard, start in zip(out, *map(np.ndarray.tolist, self.locate(windows)), strict=True):
            row[:] = self.data.shards[shard].read(start, start + self.length + 1)
        return out

    def segments(self, windows: np.ndarray) -> np.ndarray:
        """(N, length) bool: where segments begin in each window, its own beginning left out."""
        begins = np.zeros((len(windows), self.length), bool)
        for row, shard, start in zip(begins, *map(np.ndarray.tolist, self.locate(windows)), strict=True):
            row[segment_starts(start, self.length, self.data.shards[shard].document_ends, self.data.eot)] = (
                True
            )
        return begins
