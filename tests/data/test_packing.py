"""Packing: every token once, boundaries where documents begin, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptcore.data.packing import IGNORE, cu_seqlens, join, pack, segment_starts

EOT = 9
DOCUMENTS = st.lists(st.lists(st.integers(0, 8), max_size=12), max_size=8)
EOTS = st.sampled_from([EOT, None])


def loop(documents: list[list[int]], eot: int | None) -> tuple[list[int], set[int]]:
    """The stream and the first position of each segment, one token at a time."""
    stream: list[int] = []
    starts = set()
    for document in documents:
        if eot is None:
            starts.add(len(stream))
        stream.extend(document)
        if eot is not None:
            starts.add(len(stream))
            stream.append(eot)
    return stream, starts


@given(DOCUMENTS, EOTS)
@settings(max_examples=200, deadline=None)
def test_join(documents: list[list[int]], eot: int | None) -> None:
    stream, ends = join([np.array(d, np.int64) for d in documents], eot)
    assert stream.tolist() == loop(documents, eot)[0]
    assert ends.tolist() == np.cumsum([len(d) + (eot is not None) for d in documents]).tolist()


@given(DOCUMENTS, EOTS, st.integers(1, 15))
@settings(max_examples=300, deadline=None)
def test_pack_covers_every_token_once(documents: list[list[int]], eot: int | None, length: int) -> None:
    stream, starts = loop(documents, eot)
    packed = pack([np.array(d, np.int64) for d in documents], length, eot)
    count = max(0, len(stream) - 1)
    assert packed.tokens.shape == packed.targets.shape == (-(-count // length), length)
    assert packed.tokens.ravel()[:count].tolist() == stream[:count]
    assert packed.targets.ravel()[:count].tolist() == stream[1:]
    assert np.all(packed.targets.ravel()[count:] == IGNORE)
    total = packed.tokens.size
    begins = {s for s in starts if s < count} | set(range(0, total, length))
    begins |= {count} if count < total else set()
    assert packed.cu_seqlens.tolist() == [*sorted(begins), total]
    assert packed.cu_seqlens.dtype == np.int32


@given(DOCUMENTS, EOTS, st.integers(0, 20), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_segment_starts_of_any_window(
    documents: list[list[int]], eot: int | None, start: int, length: int
) -> None:
    stream, ends = join([np.array(d, np.int64) for d in documents], eot)
    assume(start + length < len(stream))  # a window shows no more than there is
    starts = loop(documents, eot)[1]
    expected = sorted(s - start for s in starts if start < s < start + length)
    assert sorted(set(segment_starts(start, length, ends, eot).tolist())) == expected


def test_boundaries_from_tokens_equal_boundaries_from_documents() -> None:
    packed = pack([np.arange(5), np.arange(3), np.arange(7)], 6, EOT)
    assert packed.tokens.shape == (3, 6)
    assert cu_seqlens(packed.tokens, EOT).tolist() == [0, 5, 6, 9, 12, 18]
    assert packed.cu_seqlens.tolist() == [0, 5, 6, 9, 12, 17, 18]  # the filling is one more


def test_an_end_of_text_opens_its_segment() -> None:
    """Input eot predicts the next document's first token and must not see the document before."""
    tokens = np.array([[1, 2, EOT, 3], [4, EOT, EOT, 5]])
    assert cu_seqlens(tokens, EOT).tolist() == [0, 2, 4, 5, 6, 8]


def test_empty_batch_and_bad_length() -> None:
    assert cu_seqlens(np.empty((0, 4), np.int64), EOT).tolist() == [0]
    assert pack([], 4, EOT).tokens.shape == (0, 4)
    with pytest.raises(ValueError, match="length: got 0"):
        pack([], 0, EOT)
