"""What every tokenizer is: text to ids, ids to bytes, a fingerprint, and a place on disk."""

from __future__ import annotations

import codecs
import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    import numpy as np

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for the token between documents


class Tokenizer(ABC):
    """Text to token ids and back.

    ``kind``: ``"bpe"``, ``"characters"`` or ``"bytes"``. ``vocab_size``: ids are below it. ``eot``: the id
    that ends a document, or None. ``special_tokens``: name to id of the tokens that stand for no text.

    Special tokens never come out of ``encode``, whatever the text says: a document that contains
    ``<|endoftext|>`` in letters is text about it, not the end. They decode to nothing.
    """

    kind: str
    vocab_size: int
    eot: int | None
    special_tokens: dict[str, int]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. Raises ``UserError`` for text that has none (lone surrogates, for
        characters those outside the vocabulary)."""

    @abstractmethod
    def _token_table(self) -> list[bytes]:
        """The bytes of each id; empty for special tokens and for ids that nothing uses."""

    @abstractmethod
    def _identity(self) -> bytes:
        """Bytes that differ exactly when two tokenizers encode differently."""

    @abstractmethod
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write what ``gptcore.data.tokenizer.load(directory)`` reads; each file appears whole."""

    @abstractmethod
    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer, with a special token of the next free id for each of ``names`` that it has not yet.

        Text is encoded as before; ``eot`` stays. The fingerprint is another one where a token was added.
        """

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``, exactly. Raises ``ValueError`` for an id outside the vocabulary."""
        table = self._table
        wanted: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for token in wanted:
            if not 0 <= token < len(table):
                raise ValueError(f"decode: got token {token}, expected 0 to {len(table) - 1}")
        return b"".join([table[token] for token in wanted])

    def stream(self) -> StreamDecoder:
        """A decoder that is fed one token at a time and never shows half a character."""
        return StreamDecoder(self)

    @functools.cached_property
    def _table(self) -> list[bytes]:
        return self._token_table()

    def byte_lengths(self) -> np.ndarray:
        """(V,) uint16: UTF-8 bytes of each token, 0 for special ones; the divisor of bits per byte."""
        import numpy as np

        return np.array([len(token) for token in self._table], dtype=np.uint16)

    @functools.cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits, equal for tokenizers that encode alike; kept in shards and checkpoints."""
        return hashlib.sha256(f"{self.kind}\n".encode() + self._identity()).hexdigest()

    def __repr__(self) -> str:
        return f"<{self.kind} tokenizer, {self.vocab_size} entries, {self.fingerprint[:12]}>"


class StreamDecoder:
    """Text from tokens as they come; the pieces joined equal ``decode`` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is still in pieces."""
        return self._utf8.decode(self._tokenizer.decode_bytes([int(token)]))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


def utf8(text: Any, where: str) -> bytes:
    """``text`` as UTF-8; raises ``TypeError`` for what is no text, ``UserError`` for lone surrogates."""
    if not isinstance(text, str):
        raise TypeError(f"{where}: got {type(text).__name__}, expected str")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"{where}: character {error.start} is a lone surrogate (U+{code:04X}), which is not text"
        ) from None
