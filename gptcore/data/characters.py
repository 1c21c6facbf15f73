"""Tokenizers without training to speak of: one id per byte, one id per character."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptcore.data.atomic import write_text
from gptcore.data.vocabulary import END_OF_TEXT, Tokenizer, utf8
from gptcore.errors import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for the end of a text. Every text has ids; nothing is learnt.

    ``added``: names of further special tokens, from 257 on.
    """

    kind = "bytes"

    def __init__(self, *, added: Sequence[str] = ()) -> None:
        self.added = tuple(added)
        self.vocab_size = 257 + len(self.added)
        self.eot = 256
        self.special_tokens = _numbered([END_OF_TEXT, *self.added], 256)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(utf8(text, "encode")) for text in texts]

    def _token_table(self) -> list[bytes]:
        return [bytes([value]) for value in range(256)] + [b""] * (1 + len(self.added))

    def _identity(self) -> bytes:
        return json.dumps([257, *self.added]).encode() if self.added else b"257"

    def with_special_tokens(self, names: Sequence[str]) -> ByteTokenizer:
        return ByteTokenizer(added=_extended(self.added, names, self.special_tokens))

    def save(self, directory: str | os.PathLike[str]) -> None:
        _save(directory, {"kind": self.kind, **_added(self.added)})


class CharacterTokenizer(Tokenizer):
    """One id per character, in code-point order, then the end of text if there is one.

    ``characters``: the vocabulary, each once. ``eot``: whether an end-of-text id follows them.
    ``replace_unknown``: characters outside the vocabulary become U+FFFD, which must be inside; otherwise
    they are an error that names the character and where it stands. ``added``: names of further special tokens, which
    come last.
    """

    kind = "characters"

    def __init__(
        self, characters: str, *, eot: bool = True, replace_unknown: bool = False, added: Sequence[str] = ()
    ) -> None:
        utf8(characters, "characters")
        self.characters = "".join(sorted(set(characters)))
        if len(self.characters) != len(characters):
            raise UserError("characters: got a character twice, expected each once")
        if not self.characters:
            raise UserError("characters: got an empty vocabulary, expected at least one character")
        if replace_unknown and REPLACEMENT not in self.characters:
            raise UserError(
                "replace_unknown: U+FFFD must be in the vocabulary to stand for unknown characters"
            )
        self.replace_unknown = replace_unknown
        self.added = tuple(added)
        self.vocab_size = len(self.characters) + eot + len(self.added)
        self.eot = len(self.characters) if eot else None
        self.special_tokens = _numbered([*[END_OF_TEXT] * eot, *self.added], len(self.characters))
        self._ids = {character: token for token, character in enumerate(self.characters)}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"encode: got {type(text).__name__}, expected str")
        ids = self._ids
        if self.replace_unknown:
            unknown = ids[REPLACEMENT]
            return [ids.get(character, unknown) for character in text]
        try:
            return [ids[character] for character in text]
        except KeyError:
            position = next(i for i, character in enumerate(text) if character not in ids)
            raise UserError(
                f"encode: character {text[position]!r} (U+{ord(text[position]):04X}) at position {position}"
                f" is not among the {len(ids)} characters of the vocabulary; leave it out, or train the"
                " tokenizer on text that has it"
            ) from None

    def _token_table(self) -> list[bytes]:
        table = [character.encode() for character in self.characters]
        return table + [b""] * len(self.special_tokens)

    def _identity(self) -> bytes:
        return json.dumps([self.characters, self.eot, self.replace_unknown, *self.added]).encode()

    def with_special_tokens(self, names: Sequence[str]) -> CharacterTokenizer:
        return CharacterTokenizer(
            self.characters,
            eot=self.eot is not None,
            replace_unknown=self.replace_unknown,
            added=_extended(self.added, names, self.special_tokens),
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        content = {
            "kind": self.kind,
            "characters": self.characters,
            "eot": self.eot is not None,
            "replace_unknown": self.replace_unknown,
            **_added(self.added),
        }
        _save(directory, content)


def train_characters(
    texts: Iterable[str], *, vocab_size: int | None = None, eot: bool = True
) -> CharacterTokenizer:
    """A character tokenizer for ``texts``.

    ``vocab_size``: at most so many ids (end of text included); when the texts have more characters, the
    rarest are replaced by U+FFFD. Default: every character that occurs, and unknown ones are an error.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        utf8(text, "train_characters")
        counts.update(text)
    room = len(counts) if vocab_size is None else vocab_size - eot
    if len(counts) <= room:
        return CharacterTokenizer("".join(counts), eot=eot)
    if room < 2:
        raise UserError(f"vocab_size: got {vocab_size}, expected at least {2 + eot} for characters")
    counts.pop(REPLACEMENT, None)
    kept = sorted(counts, key=lambda character: (-counts[character], character))[: room - 1]
    return CharacterTokenizer("".join([*kept, REPLACEMENT]), eot=eot, replace_unknown=True)


def _numbered(names: Sequence[str], first: int) -> dict[str, int]:
    return {name: first + place for place, name in enumerate(names)}


def _extended(added: Sequence[str], names: Sequence[str], known: dict[str, int]) -> tuple[str, ...]:
    return (*added, *dict.fromkeys(name for name in names if name not in known))


def _added(names: Sequence[str]) -> dict[str, Any]:
    return {"added": list(names)} if names else {}


def _save(directory: str | os.PathLike[str], content: dict[str, Any]) -> None:
    text = json.dumps({"gptcore_tokenizer": 1, **content}, ensure_ascii=False, indent=1)
    write_text(Path(directory) / "tokenizer.json", text + "\n")


def from_content(content: dict[str, Any], source: Path) -> Tokenizer:
    """The tokenizer that ``save`` described in ``content``, which was read from ``source``."""
    if content.get("gptcore_tokenizer") != 1:
        version = content.get("gptcore_tokenizer")
        raise UserError(f"{source}: got tokenizer format {version!r}, this version of gptcore reads format 1")
    added = content.get("added", [])
    if not isinstance(added, list) or not all(isinstance(name, str) and name for name in added):
        raise UserError(f"{source}: added: got {added!r}, expected names of special tokens")
    if content.get("kind") == ByteTokenizer.kind:
        return ByteTokenizer(added=added)
    characters, eot, replace = (content.get(key) for key in ("characters", "eot", "replace_unknown"))
    if content.get("kind") != CharacterTokenizer.kind or not isinstance(characters, str):
        raise UserError(f"{source}: not a tokenizer that gptcore wrote, or damaged")
    return CharacterTokenizer(characters, eot=bool(eot), replace_unknown=bool(replace), added=added)
