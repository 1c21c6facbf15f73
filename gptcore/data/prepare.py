"""From files to training data: a tokenizer, token shards for two parts, and a manifest, in one directory.

The directory appears when everything in it is complete. Its ``manifest.json`` says what it holds and
what it was made from; ``TokenDataset.open`` and ``tokenizer.load`` take the directory as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gptcore import __version__
from gptcore.data import tokenizer as tokenizers
from gptcore.data.atomic import atomic_directory, write_text
from gptcore.data.characters import CharacterTokenizer, train_characters
from gptcore.data.corpus import Corpus, Document, Reading, builtin
from gptcore.data.dataset import MANIFEST
from gptcore.data.shards import SUFFIX, ShardWriter
from gptcore.data.tokenizer import Tokenizer
from gptcore.errors import UserError
from gptcore.report.progress import Progress

BUILTIN = "builtin"
_BATCH_CHARACTERS = 1 << 21  # encoded at a time: pieces for eight threads, and the ids stay under 200 MB


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` made. Counts by part (``"train"``, ``"val"``): ``tokens`` (end of text included),
    ``documents``, ``text_bytes``. ``seconds``: the time it took. ``manifest``: what the file says."""

    directory: Path
    tokenizer: Tokenizer
    tokens: dict[str, int]
    documents: dict[str, int]
    text_bytes: dict[str, int]
    seconds: float
    manifest: dict[str, Any] = field(repr=False)


class _Source(Protocol):
    """Documents by part, to be read more than once, and how far the reading is."""

    @property
    def skipped(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[str, Document]]: ...
    def position(self) -> float: ...
    def size(self) -> float: ...
    def describe(self) -> dict[str, Any]: ...


class _Files:
    """Documents of files, for ``prepare``."""

    def __init__(
        self, inputs: Sequence[str | os.PathLike[str]], reading: Reading, fraction: float, split: str
    ):
        self._corpus = Corpus(inputs, reading)
        self._fraction = fraction
        self._method = self._corpus.method(split)

    @property
    def skipped(self) -> int:
        return self._corpus.skipped

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        return self._corpus.split(self._fraction, self._method)

    def position(self) -> float:
        return self._corpus.read_bytes

    def size(self) -> float:
        return self._corpus.total_bytes

    def describe(self) -> dict[str, Any]:
        files = [{"file": str(file), "bytes": file.stat().st_size} for file in self._corpus.files]
        return {"inputs": files, "split": {"method": self._method, "val_fraction": self._fraction}}


class _Builtin:
    """The running Python's own text, for ``prepare``."""

    skipped = 0  # the corpus leaves out empty documents itself

    def __init__(self, fraction: float, max_bytes: int | None, code: bool) -> None:
        self._corpus = builtin(max_bytes=max_bytes, code=code, val_fraction=fraction)
        self._fraction = fraction
        self._position = 0

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        self._position = 0
        for part, texts in (("train", self._corpus.train), ("val", self._corpus.val)):
            for number, text in enumerate(texts):
                yield part, Document(text, f"{BUILTIN} {part} {number}")
                self._position += len(text)

    def position(self) -> float:
        return self._position

    def size(self) -> float:
        return sum(map(len, self._corpus.train)) + sum(map(len, self._corpus.val))

    def describe(self) -> dict[str, Any]:
        split = {"method": "hash", "val_fraction": self._fraction}
        return {"inputs": [{"corpus": BUILTIN, **self._corpus.manifest}], "split": split}


def prepare(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer = "bpe",
    vocab_size: int | None = None,
    val_fraction: float = 0.05,
    split: str = "auto",
    text_field: str = "text",
    separator: str | None = None,
    errors: str = "strict",
    eot: bool | None = None,
    tokenizer_bytes: int = 64 << 20,
    shard_tokens: int = 1 << 30,
    max_bytes: int | None = None,
    code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Prepared:
    """Tokenise ``inputs`` into ``output_dir``.

    ``inputs``: files and directories (.txt, .jsonl, .parquet, also .zst and .gz), or ``"builtin"``.
    ``tokenizer``: ``"bpe"`` or ``"characters"`` to train one, ``"bytes"``, a path to load one from, or one.
    ``vocab_size``: of the trained one, default 8192 for bpe. ``val_fraction``, ``split``: what is held out
    and how, see ``Corpus.split``. ``text_field``, ``separator``, ``errors``: see ``Reading``.
    ``eot``: whether characters have an end of text, default when a part has more than one document.
    ``tokenizer_bytes``: train bpe on about so much of the training part. ``shard_tokens``: begin a new file
    after so many. ``max_bytes``, ``code``: of the builtin corpus. ``overwrite``: replace data prepared
    before; without it an existing directory is an error. ``quiet``: no progress.

    Raises ``UserError`` for anything wrong with input or disk; then ``output_dir`` is as it was.
    """
    began = time.monotonic()
    target = Path(output_dir)
    _check_target(target, overwrite)
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    source: _Source
    if [str(path) for path in paths] == [BUILTIN]:
        source = _Builtin(val_fraction, max_bytes, code)
    else:
        source = _Files(paths, Reading(text_field, separator, errors), val_fraction, split)
    chosen = _tokenizer(tokenizer, source, vocab_size, eot, tokenizer_bytes, quiet)
    with atomic_directory(target, replace=overwrite) as directory:
        chosen.save(directory)
        writers = _Parts(directory, chosen, shard_tokens)
        with writers:
            text_hash = _encode(source, chosen, writers, quiet)
        splits = writers.finish(val_fraction)
        manifest = {
            "format": 1,
            "gptcore": __version__,
            "tokenizer": {
                "kind": chosen.kind,
                "vocab_size": chosen.vocab_size,
                "eot": chosen.eot,
                "fingerprint": chosen.fingerprint,
            },
            **source.describe(),
            "empty_documents_left_out": source.skipped,
            "text_sha256": text_hash,
            "splits": splits,
        }
        write_text(directory / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    tokens, documents, text_bytes = (
        {part: entry[key] for part, entry in splits.items()} for key in ("tokens", "documents", "text_bytes")
    )
    return Prepared(target, chosen, tokens, documents, text_bytes, time.monotonic() - began, manifest)


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse early what ``atomic_directory`` would refuse after all the work, and what is not ours."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; name a directory for the prepared data")
    if (target / MANIFEST).is_file():
        if not overwrite:
            raise UserError(
                f"{target} already holds prepared data; overwrite it (overwrite=True) or name another"
            )
    elif any(target.iterdir()):
        raise UserError(f"{target} is not empty and holds no prepared data; name another directory")


def _tokenizer(
    wanted: str | os.PathLike[str] | Tokenizer,
    source: _Source,
    vocab_size: int | None,
    eot: bool | None,
    limit: int,
    quiet: bool,
) -> Tokenizer:
    """Train or load what ``prepare`` was asked for."""
    if isinstance(wanted, Tokenizer):
        return wanted
    if wanted == "characters":
        return _characters(source, vocab_size, eot, quiet)
    if wanted == "bpe":
        return tokenizers.train(_sample(source, limit, quiet), kind="bpe", vocab_size=vocab_size)
    if wanted == "bytes":
        return tokenizers.train((), kind="bytes", vocab_size=vocab_size)
    if vocab_size is not None:
        raise UserError(f"vocab_size: got {vocab_size}, but the tokenizer '{wanted}' is loaded, not trained")
    return tokenizers.load(wanted)


def _characters(source: _Source, vocab_size: int | None, eot: bool | None, quiet: bool) -> Tokenizer:
    """Characters of both parts: one that only the held-out text has must have an id as well."""
    documents = {"train": 0, "val": 0}

    def texts() -> Iterator[str]:
        for part, document in _reported(source, "characters", quiet):
            documents[part] += document.ends
            yield document.text

    trained = train_characters(texts(), vocab_size=vocab_size, eot=eot is not False)
    if eot is None and max(documents.values()) <= 1:
        return CharacterTokenizer(trained.characters, eot=False, replace_unknown=trained.replace_unknown)
    return trained


def _reported(source: _Source, label: str, quiet: bool) -> Iterator[tuple[str, Document]]:
    """The documents of ``source``, with a progress line in bytes of input."""
    with Progress(source.size(), unit="B", label=label, quiet=quiet) as progress:
        for item in source:
            yield item
            progress.update(source.position() - progress.done)
        progress.update(source.size() - progress.done)


def _sample(source: _Source, limit: int, quiet: bool) -> Iterator[str]:
    """Texts of the training part, about ``limit`` bytes of them: chosen by hash when there are more."""
    share = min(1.0, limit / max(1.0, source.size()))
    taken = 0
    for part, document in _reported(source, "vocabulary", quiet):
        if part != "train":
            continue
        digest = hashlib.sha256(b"vocabulary " + document.text.encode()).digest()
        if int.from_bytes(digest[:8], "big") < share * 2**64:
            yield document.text
            taken += len(document.text)
        if taken >= limit:
            return


class _Parts:
    """The shards of both parts, each begun with its first document."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        if shard_tokens < 1:
            raise UserError(f"shard_tokens: got {shard_tokens}, expected at least 1")
        self._directory = directory
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._open: dict[str, ShardWriter] = {}
        self._splits: dict[str, dict[str, Any]] = {}

    def append(self, part: str, ids: Sequence[int], ends: bool) -> None:
        if part not in self._open:
            number = len(self._splits.get(part, {"shards": ()})["shards"])
            self._open[part] = ShardWriter(self._directory / f"{part}-{number:05d}{SUFFIX}", self._tokenizer)
            self._open[part].__enter__()
        writer = self._open[part]
        writer.append(ids, ends=ends)
        if ends and writer.tokens >= self._shard_tokens:
            self._close(part)

    def _close(self, part: str) -> None:
        writer = self._open.pop(part)
        writer.__exit__(None, None, None)
        entry = self._splits.setdefault(part, {"tokens": 0, "documents": 0, "text_bytes": 0, "shards": []})
        entry["tokens"] += writer.tokens
        entry["documents"] += writer.documents
        entry["text_bytes"] += writer.text_bytes
        entry["shards"].append({"file": writer.path.name, "tokens": writer.tokens})

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for part in list(self._open):
            if error is None:
                self._close(part)
            else:
                self._open.pop(part).__exit__(kind, error, trace)

    def finish(self, val_fraction: float) -> dict[str, dict[str, Any]]:
        """What was written, by part. Raises ``UserError`` when a part that was asked for is empty."""
        documents = sum(entry["documents"] for entry in self._splits.values())
        if not documents:
            raise UserError("the input holds no text")
        wanted = ["train", "val"] if val_fraction > 0 else ["train"]
        for part in wanted:
            if part not in self._splits:
                raise UserError(
                    f"none of the {documents} documents fell into '{part}' at val_fraction {val_fraction};"
                    " change it, or hold out the end of each file with split='tail'"
                )
        return {part: self._splits[part] for part in wanted}


def _encode(source: _Source, tokenizer: Tokenizer, parts: _Parts, quiet: bool) -> str:
    """Encode every document into its part; returns the SHA-256 of all text in the order of reading."""
    batch: list[tuple[str, Document]] = []
    size, text_hash = 0, hashlib.sha256()
    for item in _reported(source, "tokens", quiet):
        batch.append(item)
        size += len(item[1].text)
        text_hash.update(item[1].text.encode())
        if size >= _BATCH_CHARACTERS:
            _write(batch, tokenizer, parts)
            batch, size = [], 0
    _write(batch, tokenizer, parts)
    return text_hash.hexdigest()


def _write(batch: list[tuple[str, Document]], tokenizer: Tokenizer, parts: _Parts) -> None:
    try:
        encoded = tokenizer.encode_batch([document.text for _, document in batch])
    except UserError:
        for _, document in batch:  # once more, one by one, to say which
            try:
                tokenizer.encode(document.text)
            except UserError as error:
                raise UserError(f"{document.origin}: {error}") from None
        raise
    for (part, document), ids in zip(batch, encoded, strict=True):
        parts.append(part, ids, document.ends)
