"""Documents into rows: joined, cut to length, with the boundaries that attention may be told.

A segment begins at an end-of-text token: the token that closed one document opens the next. So every
segment starts the way generation does, no token of one document is predicted from another, and the end
of a document is predicted inside it. Without an end-of-text token a segment begins at a document's
first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IGNORE = -100  # a target that no loss counts, torch's convention


class Packed(NamedTuple):
    """Rows of packed documents: ``tokens`` and ``targets`` (R, T) int64, ``cu_seqlens`` (S + 1,) int32."""

    tokens: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray


def join(documents: Sequence[np.ndarray], eot: int | None) -> tuple[np.ndarray, np.ndarray]:
    """All documents in one stream, each followed by ``eot`` unless that is None.

    Returns the stream (N,) int64 and where each document ends in it (D,) int64, the ``eot`` included.
    """
    closing = np.empty(0, np.int64) if eot is None else np.array([eot], np.int64)
    parts = [part for document in documents for part in (np.asarray(document, np.int64), closing)]
    lengths = np.array([len(document) + len(closing) for document in documents], np.int64)
    return np.concatenate(parts) if parts else np.empty(0, np.int64), np.cumsum(lengths)


def segment_starts(start: int, length: int, document_ends: np.ndarray, eot: int | None) -> np.ndarray:
    """Where segments begin in a row that shows ``length`` tokens of the stream from ``start`` on.

    ``document_ends``: (D,) rising, as in a shard. Returns positions in the row, (K,) int64, without 0.
    """
    shift = 1 if eot is not None else 0
    first, last = np.searchsorted(document_ends, [start + shift + 1, start + length + shift])
    return document_ends[first:last].astype(np.int64) - shift - start


def cu_seqlens_at(begins: np.ndarray) -> np.ndarray:
    """Cumulative lengths for a (B, T) bool array that marks the first token of each segment.

    Every row begins one too. Returns (S + 1,) int32 from 0 to B * T, over the rows laid end to end.
    """
    rows, length = begins.shape
    marks = begins.copy()
    if length:
        marks[:, 0] = True
    return np.append(np.flatnonzero(marks), rows * length).astype(np.int32)


def cu_seqlens(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Cumulative lengths of the segments of ``tokens`` (B, T): they begin at rows and at ``eot``.

    Returns (S + 1,) int32 from 0 to B * T, for tokens flattened to (B * T,).
    """
    return cu_seqlens_at(tokens == eot)


def pack(documents: Sequence[np.ndarray], length: int, eot: int | None, *, fill: int = 0) -> Packed:
    """Join ``documents`` and cut the stream into rows of ``length`` inputs with their targets.

    Every token but the first is a target exactly once. The last row is filled up with ``fill`` as tokens
    and ``IGNORE`` as targets; the filling is a segment of its own.
    """
    if length < 1:
        raise ValueError(f"pack: length: got {length}, expected at least 1")
    stream, ends = join(documents, eot)
    count = max(0, len(stream) - 1)
    rows = -(-count // length)
    tokens = np.full(rows * length, fill, np.int64)
    targets = np.full(rows * length, IGNORE, np.int64)
    tokens[:count] = stream[:-1] if count else []
    targets[:count] = stream[1:]
    begins = np.zeros(rows * length + 1, bool)
    begins[segment_starts(0, count, ends, eot)] = True
    begins[count] = True
    shape = (rows, length)
    return Packed(
        tokens.reshape(shape), targets.reshape(shape), cu_seqlens_at(begins[: rows * length].reshape(shape))
    )
