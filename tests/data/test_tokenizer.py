"""Tokenizers: round trips, known encodings, streaming, identity, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.data import tokenizer
from gptcore.data.byte_bpe import byte_of_letter, train_bpe
from gptcore.data.characters import ByteTokenizer, CharacterTokenizer, train_characters
from gptcore.data.tokenizer import END_OF_TEXT, Tokenizer
from gptcore.errors import UserError

GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2_bpe"
TEXT = "The cat sat on the mat, the cat did. Größe, naïve, 日本語 🙂!\n\n  def f(x):\n\treturn x + 1\n" * 20
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)

needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason=f"GPT-2's vocabulary files are not at {GPT2}")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([TEXT], vocab_size=400)


@pytest.fixture(scope="module", params=["bpe", "characters", "bytes"])
def any_kind(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer.train([TEXT], kind=request.param, vocab_size=300 if request.param == "bpe" else None)


@needs_gpt2
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        (" the quick brown fox", [262, 2068, 7586, 21831]),
        ("\n\nx", [198, 198, 87]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),  # letters, not the special token
    ],
)
def test_gpt2_encodings(text: str, ids: list[int]) -> None:
    gpt2 = tokenizer.load(GPT2)
    assert gpt2.encode(text) == ids and gpt2.decode(ids) == text
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


@needs_gpt2
def test_gpt2_survives_saving(tmp_path: Path) -> None:
    gpt2 = tokenizer.load(GPT2)
    gpt2.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert again.fingerprint == gpt2.fingerprint and again.encode(TEXT) == gpt2.encode(TEXT)


def test_letters_are_a_bijection() -> None:
    letters = byte_of_letter()
    assert sorted(letters.values()) == list(range(256))
    assert letters["Ġ"] == ord(" ") and letters["Ċ"] == ord("\n") and letters["A"] == ord("A")


@given(ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_bpe_round_trip_and_byte_lengths(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert int(bpe.byte_lengths()[ids].sum()) == len(text.encode())
    assert bpe.eot not in ids


@given(ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_bytes_round_trip(text: str) -> None:
    byte = ByteTokenizer()
    assert byte.encode(text) == list(text.encode()) and byte.decode(byte.encode(text)) == text


@given(st.lists(st.integers(0, 299), max_size=40))
@settings(max_examples=150, deadline=None)
def test_streaming_equals_decoding(any_kind: Tokenizer, ids: list[int]) -> None:
    """Whatever a model samples, half characters included, the pieces add up to the whole."""
    ids = [token % any_kind.vocab_size for token in ids]
    stream = any_kind.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == any_kind.decode(ids)


def test_streaming_never_shows_half_a_character() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.push("é".encode()[0]) == "" and stream.finish() == "\ufffd"


def test_batch_equals_single(any_kind: Tokenizer) -> None:
    texts = ["the cat", "", "mat, the"]
    assert any_kind.encode_batch(texts) == [any_kind.encode(text) for text in texts]
    assert any_kind.encode("") == []


def test_save_and_load_keep_identity(any_kind: Tokenizer, tmp_path: Path) -> None:
    any_kind.save(tmp_path)
    for spec in (tmp_path, str(tmp_path / "tokenizer.json")):
        again = tokenizer.load(spec)
        assert (again.kind, again.vocab_size, again.eot) == (any_kind.kind, any_kind.vocab_size, any_kind.eot)
        assert again.fingerprint == any_kind.fingerprint
        assert again.encode(TEXT) == any_kind.encode(TEXT)


def test_special_token_in_text_stays_text(bpe: Tokenizer) -> None:
    assert bpe.eot not in bpe.encode(END_OF_TEXT)
    assert bpe.decode([bpe.eot or 0]) == "" and bpe.special_tokens == {END_OF_TEXT: bpe.vocab_size - 1}


def test_training_is_deterministic(bpe: Tokenizer) -> None:
    """Another process has other hash seeds and another thread schedule, and must learn the same ids."""
    program = (
        "import sys; from gptcore.data.byte_bpe import train_bpe;"
        "print(train_bpe([sys.stdin.read()], vocab_size=400).fingerprint)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], input=TEXT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == bpe.fingerprint


def test_fingerprint_tells_vocabularies_apart(bpe: Tokenizer) -> None:
    other = train_bpe([TEXT.upper()], vocab_size=400)
    prints = {
        t.fingerprint
        for t in (bpe, other, ByteTokenizer(), CharacterTokenizer("ab"), CharacterTokenizer("ac"))
    }
    assert len(prints) == 5
    with pytest.raises(UserError, match="vocabulary mismatch: the checkpoint a uses tokenizer"):
        tokenizer.require_same(bpe.fingerprint, "the checkpoint a", other.fingerprint, "the data b")


def test_fingerprint_ignores_how_the_file_is_spelt(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.load(tmp_path).fingerprint == bpe.fingerprint
    content["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.load(tmp_path).fingerprint != bpe.fingerprint


def test_characters_are_sorted_and_unknown_ones_named() -> None:
    characters = train_characters(["hello", "world"], eot=False)
    assert characters.characters == "dehlorw" and characters.vocab_size == 7 and characters.eot is None
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\) at position 2 is not among the 7 characters"):
        characters.encode("heé")


def test_rare_characters_are_replaced() -> None:
    characters = train_characters(["aaabbbc", "d\ufffd"], vocab_size=4)
    assert characters.characters == "ab\ufffd" and characters.eot == 3
    assert characters.decode(characters.encode("abxd")) == "ab\ufffd\ufffd"


@pytest.mark.parametrize("kind", ["bpe", "characters", "bytes"])
def test_lone_surrogates_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"surrogate|not among"):
        tokenizer.train([TEXT], kind=kind).encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, 257, 50304])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"got token {token}, expected 0 to 256"):
        ByteTokenizer().decode([65, token])


def test_bad_options() -> None:
    with pytest.raises(UserError, match="did you mean 'characters'"):
        tokenizer.train(["a"], kind="character")
    with pytest.raises(UserError, match="at least 257"):
        tokenizer.train(["a"], vocab_size=256)
    with pytest.raises(UserError, match="a byte tokenizer has 257"):
        tokenizer.train(["a"], kind="bytes", vocab_size=300)
    with pytest.raises(UserError, match="at least 3 for characters"):
        tokenizer.train(["abc"], kind="characters", vocab_size=2)
    with pytest.raises(TypeError, match="got int, expected str"):
        ByteTokenizer().encode(3)  # type: ignore[arg-type]


def test_bad_files_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        tokenizer.load(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        tokenizer.load(tmp_path)
    for content in ("", "{", "[]", '{"model": {}}', '{"gptcore_tokenizer": 2}', '{"gptcore_tokenizer": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: "):
            tokenizer.load(tmp_path)


def test_tokenizer_json_of_another_kind_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models

    Engine(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not a byte-level BPE"):
        tokenizer.load(tmp_path)


def test_settings_of_one_model_do_not_cut_texts(bpe: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine

    bpe.save(tmp_path)
    engine = Engine.from_file(str(tmp_path / "tokenizer.json"))
    engine.enable_truncation(4)
    engine.enable_padding(length=8)
    engine.save(str(tmp_path / "tokenizer.json"))
    again = tokenizer.load(tmp_path)
    assert again.encode(TEXT) == bpe.encode(TEXT) and again.encode("a") == bpe.encode("a")
    assert again.fingerprint == bpe.fingerprint


def test_damaged_gpt2_pair(tmp_path: Path) -> None:
    letters = byte_of_letter()
    (tmp_path / "encoder.json").write_text(json.dumps(letters))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b c\n")
    with pytest.raises(UserError, match=r"vocab\.bpe, line 2: expected two entries"):
        tokenizer.load(tmp_path)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nzq x\n")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        tokenizer.load(tmp_path)
