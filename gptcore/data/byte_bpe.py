"""Byte-level BPE through the ``tokenizers`` library: trained here, or loaded from what others trained.

The library does the merging; this file decides what a vocabulary means: which bytes each id stands for,
which ids are special, and when two vocabularies are the same.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptcore.data.atomic import write_text
from gptcore.data.vocabulary import END_OF_TEXT, Tokenizer, utf8
from gptcore.errors import UserError

# Names that published vocabularies give to the end of a document, tried in this order when a
# tokenizer.json comes without a tokenizer_config.json that says.
_EOT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@functools.cache
def byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: the letter that stands for each byte in a vocabulary file, inverted.

    Bytes that print in Latin-1 stand for themselves, the other 68 take the code points from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return letters


class BpeTokenizer(Tokenizer):
    """A byte-level BPE given as the text of a ``tokenizer.json``.

    ``eot``: the name of the end-of-text token; default: the first of the usual names that is there.
    ``source``: where it came from, for error messages. Raises ``UserError`` for a file that is damaged or
    not byte-level.
    """

    kind = "bpe"

    def __init__(
        self, tokenizer_json: str, *, eot: str | None = None, source: str = "tokenizer.json"
    ) -> None:
        from tokenizers import Tokenizer as Engine

        try:
            content = json.loads(tokenizer_json)
            self._engine = Engine.from_str(tokenizer_json)
            self._vocabulary: dict[str, int] = content["model"]["vocab"]
            self._added: list[dict[str, Any]] = content.get("added_tokens") or []
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: cannot be read as a tokenizer: {_first_line(error)}") from None
        if not _is_byte_level(content.get("decoder")) or not isinstance(self._vocabulary, dict):
            raise UserError(
                f"{source}: not a byte-level BPE, the kind of vocabulary that gptcore trains and loads"
            )
        # Text that merely spells a special token must not become one.
        self._engine.encode_special_tokens = True
        # Some published files cut or fill every text to one model's length.
        self._engine.no_truncation()
        self._engine.no_padding()
        self._content = content
        self._json = tokenizer_json
        self.special_tokens = {token["content"]: token["id"] for token in self._added if token.get("special")}
        self.vocab_size = 1 + max([*self._vocabulary.values(), *(token["id"] for token in self._added)])
        self.eot = self._find_eot(eot, source)
        self._table  # noqa: B018  a letter outside the alphabet is an error now, not at the first decode

    def _find_eot(self, name: str | None, source: str) -> int | None:
        if name is not None:
            token = self._engine.token_to_id(name)
            if token is None:
                raise UserError(f"{source}: no token '{name}' to end a text with")
            return int(token)
        return next((self.special_tokens[name] for name in _EOT_NAMES if name in self.special_tokens), None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            utf8(text, "encode")
        encoded = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _token_table(self) -> list[bytes]:
        letters = byte_of_letter()
        table = [b""] * self.vocab_size
        added = {token["id"] for token in self._added}
        for text, token in self._vocabulary.items():
            if token in added:
                continue
            try:
                table[token] = bytes([letters[letter] for letter in text])
            except KeyError:
                raise UserError(f"tokenizer: entry {token} ({text!r}) is not made of byte letters") from None
        for entry in self._added:
            if not entry.get("special"):
                table[entry["id"]] = entry["content"].encode()
        return table

    def _identity(self) -> bytes:
        """What decides the ids, in one spelling whatever version of the library wrote the file."""
        model = self._content["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
        added = sorted((token["id"], token["content"], bool(token.get("special"))) for token in self._added)
        added_ids = {token for token, _, _ in added}
        vocabulary = sorted((i, text) for text, i in self._vocabulary.items() if i not in added_ids)
        steps = [_effective(self._content.get(step)) for step in ("normalizer", "pre_tokenizer")]
        whole = [vocabulary, merges, added, steps, bool(model.get("ignore_merges"))]
        return json.dumps(whole, sort_keys=True).encode()

    def with_special_tokens(self, names: Sequence[str]) -> BpeTokenizer:
        missing = [name for name in dict.fromkeys(names) if name not in self.special_tokens]
        if not missing:
            return self
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        entries = []
        free = self.vocab_size
        for name in missing:  # a name that the vocabulary has keeps its id, and is special from now on
            token = self._engine.token_to_id(name)
            entries.append({"id": free if token is None else token, "content": name, **flags})
            free += token is None
        kept = [entry for entry in self._added if entry["content"] not in missing]
        content = {**self._content, "added_tokens": [*kept, *entries]}
        return BpeTokenizer(json.dumps(content, ensure_ascii=False), eot=self._eot_name(), source="tokenizer")

    def _eot_name(self) -> str | None:
        by_id = {token: name for name, token in self.special_tokens.items()}
        return None if self.eot is None else by_id.get(self.eot, self._engine.id_to_token(self.eot))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which other libraries read too."""
        config = json.dumps({"eos_token": self._eot_name()}, indent=1)
        write_text(Path(directory) / "tokenizer.json", self._json)
        write_text(Path(directory) / "tokenizer_config.json", config + "\n")


def _is_byte_level(step: dict[str, Any] | None) -> bool:
    if not step:
        return False
    return step.get("type") == "ByteLevel" or any(_is_byte_level(inner) for inner in step.get("decoders", ()))


def _effective(step: Any) -> Any:
    """A pipeline step without the fields that change offsets only, and with defaults spelled out."""
    if isinstance(step, dict):
        kept = {key: _effective(value) for key, value in step.items() if key != "trim_offsets"}
        return {"use_regex": True, **kept} if step.get("type") == "ByteLevel" else kept
    return [_effective(inner) for inner in step] if isinstance(step, list) else step


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _assemble(vocabulary: dict[str, int], merges: list[list[str]], source: str) -> BpeTokenizer:
    """A tokenizer.json of GPT-2's kind; an end-of-text token is added as the last id if there is none."""
    vocabulary = dict(vocabulary)
    eot = vocabulary.setdefault(END_OF_TEXT, max(vocabulary.values(), default=-1) + 1)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": eot, "content": END_OF_TEXT, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return BpeTokenizer(json.dumps(content, ensure_ascii=False), eot=END_OF_TEXT, source=source)


def train_bpe(texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2) -> BpeTokenizer:
    """Learn merges from ``texts``: the same texts give the same ids on every machine and thread count.

    ``vocab_size``: the 256 bytes, the end of text and the merges together; a small corpus may not hold
    so many pairs that occur ``min_frequency`` times, then the vocabulary is smaller.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(
            f"vocab_size: got {vocab_size}, expected at least 257 (256 bytes and the end of text)"
        )
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    engine.train_from_iterator(_checked(texts), trainer)
    model = json.loads(engine.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return _assemble(model["vocab"], merges, "train_bpe")


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        utf8(text, "train_bpe")
        yield text


def load_gpt2_pair(vocabulary: Path, merges: Path) -> BpeTokenizer:
    """GPT-2's two files: ``encoder.json`` (entry to id) and ``vocab.bpe`` (one merge a line, best first)."""
    try:
        entries = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{vocabulary.parent}: cannot be read as a GPT-2 vocabulary: {_first_line(error)}"
        ) from None
    if not isinstance(entries, dict) or not all(isinstance(token, int) for token in entries.values()):
        raise UserError(f"{vocabulary}: expected a JSON object that maps entries to ids")
    rules = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{merges}, line {number}: expected two entries separated by a space")
        rules.append(pair)
    return _assemble(entries, rules, str(vocabulary.parent))
