"""A corpus: documents from files or from the running interpreter, in two parts, train and held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator

from gptcore.data.builtin_corpus import BuiltinCorpus, builtin
from gptcore.data.reading import Document, FileReader, Reading, find_files
from gptcore.errors import UserError, unknown_name

__all__ = ["SPLIT_METHODS", "BuiltinCorpus", "Corpus", "Document", "Reading", "builtin", "held_out"]

SPLIT_METHODS = ("auto", "hash", "tail")
_FEW_FILES = 20  # so few text files are books rather than articles: each gives its end to the held-out part


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: decided by its SHA-256, so copies stay together."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class Corpus:
    """Documents of files and directories, in the order given, streamed anew at each iteration.

    ``inputs``: paths. ``reading``: how to read them. ``skipped``: documents without a letter, left out by
    the last iteration. ``total_bytes`` and ``read_bytes`` are of the files as they are, for progress.
    """

    def __init__(
        self,
        inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        reading: Reading | None = None,
    ) -> None:
        paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
        self.files = find_files(paths)
        self.reading = reading or Reading()
        self.total_bytes = sum(file.stat().st_size for file in self.files)
        self.skipped = 0
        self._finished_bytes = 0
        self._reader: FileReader | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes of the files consumed by the running iteration."""
        return self._finished_bytes + (self._reader.position if self._reader else 0)

    def __iter__(self) -> Iterator[Document]:
        return (document for documents in self._by_file() for document in documents)

    def _by_file(self) -> Iterator[Iterator[Document]]:
        self._finished_bytes = self.skipped = 0
        for file in self.files:
            self._reader = FileReader(file, self.reading)
            yield self._with_text(self._reader)
            self._finished_bytes += self._reader.position
            self._reader = None

    def _with_text(self, documents: Iterable[Document]) -> Iterator[Document]:
        inside = False  # a document in pieces is kept whole, blank pieces and all
        for document in documents:
            if inside or not document.ends or document.text.strip():
                yield document
            else:
                self.skipped += 1
            inside = not document.ends

    def split(self, fraction: float, method: str = "auto") -> Iterator[tuple[str, Document]]:
        """Each document with its part, ``"train"`` or ``"val"``; about ``fraction`` is held out.

        ``"hash"``: whole documents, by their SHA-256. ``"tail"``: the last ``fraction`` of every file's
        characters, the cut document ending in both. ``"auto"``: tail for fewer than 20 text files of one
        document each, hash for everything else.
        """
        if not 0 <= fraction < 1:
            raise UserError(f"val_fraction: got {fraction}, expected at least 0 and below 1")
        return self._split_tails(fraction) if self.method(method) == "tail" else self._split_by_hash(fraction)

    def method(self, method: str = "auto") -> str:
        """What ``"auto"`` means for these files."""
        if method not in SPLIT_METHODS:
            raise unknown_name("split method", method, SPLIT_METHODS)
        if method != "auto":
            return method
        plain = all(".txt" in file.name.lower() for file in self.files) and self.reading.separator is None
        return "tail" if plain and len(self.files) < _FEW_FILES else "hash"

    def _split_by_hash(self, fraction: float) -> Iterator[tuple[str, Document]]:
        part, inside = "train", False
        for document in self:
            if not inside:  # the first piece decides for the others
                part = "val" if held_out(document.text, fraction) else "train"
            inside = not document.ends
            yield part, document

    def _split_tails(self, fraction: float) -> Iterator[tuple[str, Document]]:
        lengths = [sum(len(document.text) for document in documents) for documents in self._by_file()]
        for length, documents in zip(lengths, self._by_file(), strict=True):
            left = int(length * (1 - fraction))  # characters still to train on
            begun = False  # the held-out part of this file
            for document in documents:
                if not fraction or len(document.text) < left:
                    yield "train", document
                    left -= len(document.text)
                    continue
                head, tail = document.text[:left], document.text[left:]
                left = 0
                if head:  # the training part of the document ends here, whether or not the document does
                    yield "train", Document(head, document.origin)
                if tail or begun:
                    yield "val", Document(tail, document.origin, document.ends)
                    begun = True
