"""Tokenizers: train one, load one, tell whether two are the same.

Kinds: ``bpe`` (byte-level, GPT-2's scheme), ``characters``, ``bytes``. Their common face is
:class:`gptcore.data.vocabulary.Tokenizer`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptcore.data.vocabulary import END_OF_TEXT, StreamDecoder, Tokenizer
from gptcore.errors import UserError, unknown_name

__all__ = ["END_OF_TEXT", "KINDS", "StreamDecoder", "Tokenizer", "load", "require_same", "train"]

KINDS = ("bpe", "characters", "bytes")
_GPT2_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def train(
    texts: Iterable[str], *, kind: str = "bpe", vocab_size: int | None = None, eot: bool = True
) -> Tokenizer:
    """A tokenizer for ``texts``.

    ``vocab_size``: for ``bpe`` the 256 bytes, the end of text and the merges, default 8192; for
    ``characters`` an upper bound, default none; for ``bytes`` it is always 257. ``eot``: whether
    ``characters`` has an end-of-text id (the other kinds always have one).
    """
    from gptcore.data import byte_bpe, characters

    if kind == "bpe":
        return byte_bpe.train_bpe(texts, vocab_size=8192 if vocab_size is None else vocab_size)
    if kind == "characters":
        return characters.train_characters(texts, vocab_size=vocab_size, eot=eot)
    if kind == "bytes":
        if vocab_size not in (None, 257):
            raise UserError(
                f"vocab_size: got {vocab_size}, a byte tokenizer has 257 (256 bytes and the end of text)"
            )
        return characters.ByteTokenizer()
    raise unknown_name("tokenizer kind", kind, KINDS)


def load(spec: str | os.PathLike[str], *, eot: str | None = None) -> Tokenizer:
    """The tokenizer that ``spec`` names.

    ``spec``: ``"bytes"``; a ``tokenizer.json``; or a directory that holds one (what ``save`` and ``prepare``
    write, or a published model) or GPT-2's pair ``encoder.json`` and ``vocab.bpe``. ``eot``: the name of
    the end-of-text token, where it is not one of the usual ones. Raises ``UserError`` when there is none.
    """
    if spec == "bytes":
        from gptcore.data.characters import ByteTokenizer

        return ByteTokenizer()
    path = Path(spec)
    if path.is_file():
        return _load_json(path, eot)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _load_json(path / "tokenizer.json", eot)
        for vocabulary, merges in _GPT2_PAIRS:
            if (path / vocabulary).is_file() and (path / merges).is_file():
                from gptcore.data.byte_bpe import load_gpt2_pair

                return load_gpt2_pair(path / vocabulary, path / merges)
        raise UserError(f"{path}: holds no tokenizer.json and no encoder.json with vocab.bpe")
    raise UserError(f"no tokenizer at '{path}'; give 'bytes', a tokenizer.json or a directory that holds one")


def is_there(directory: str | os.PathLike[str]) -> bool:
    """Whether ``load(directory)`` would find a tokenizer's files."""
    pairs = [("tokenizer.json", "tokenizer.json"), *_GPT2_PAIRS]
    return any(all((Path(directory) / name).is_file() for name in pair) for pair in pairs)


def _load_json(path: Path, eot: str | None) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read as a tokenizer: expected a JSON object")
    if "gptcore_tokenizer" in content:
        from gptcore.data.characters import from_content

        return from_content(content, path)
    from gptcore.data.byte_bpe import BpeTokenizer

    return BpeTokenizer(
        text, eot=eot or _configured_eot(path.with_name("tokenizer_config.json")), source=str(path)
    )


def _configured_eot(path: Path) -> str | None:
    """The ``eos_token`` of the file that published models keep beside their tokenizer, if it says one."""
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        name = config.get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    name = name.get("content") if isinstance(name, dict) else name
    return name if isinstance(name, str) else None


def require_same(fingerprint: str, owner: str, other_fingerprint: str, other_owner: str) -> None:
    """Raise ``UserError`` unless the two fingerprints are equal.

    ``owner`` and ``other_owner`` say whose they are, such as ``"the checkpoint runs/a"``.
    """
    if fingerprint != other_fingerprint:
        raise UserError(
            f"vocabulary mismatch: {owner} uses tokenizer {fingerprint[:12]}, {other_owner} uses"
            f" {other_fingerprint[:12]}; use the tokenizer that {owner} was made with"
        )
