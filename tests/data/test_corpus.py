"""Corpora: every format and compression round-trips, every fault names its place, builtin repeats itself."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.data import corpus, reading
from gptcore.data.byte_bpe import train_bpe
from gptcore.data.corpus import Corpus, Reading
from gptcore.errors import UserError

TEXTS = ["first document", "second\nwith two lines", "größe 日本 🙂", "   \n ", "last"]
KEPT = [text for text in TEXTS if text.strip()]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def parquet(texts: list[str | None], field: str = "text") -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({field: pa.array(texts, pa.string()), "id": range(len(texts))}), sink, row_group_size=2
    )
    return sink.getvalue().to_pybytes()


def plain(content: bytes) -> bytes:
    return content


COMPRESSORS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("", plain),
    (".gz", gzip.compress),
    (".zst", zstandard.ZstdCompressor().compress),
]


def texts_of(path: Path, **options: str) -> list[str]:
    return [document.text for document in Corpus(path, Reading(**options))]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS)
def test_every_format_in_every_compression(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    for name, content in (("a.jsonl", jsonl(TEXTS)), ("b.parquet", parquet([*TEXTS, None]))):
        path = tmp_path / (name + suffix)
        path.write_bytes(compress(content))
        assert texts_of(path) == KEPT
    text = tmp_path / ("c.txt" + suffix)
    text.write_bytes(compress(b"\xef\xbb\xbf" + "\n".join(KEPT).encode()))
    assert texts_of(text) == ["\n".join(KEPT)]


@pytest.mark.parametrize(
    ("content", "name"), [(jsonl(["x"], "body"), "a.jsonl"), (parquet(["x"], "body"), "a.parquet")]
)
def test_other_text_field(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts_of(tmp_path / name, text_field="body") == ["x"]
    with pytest.raises(
        UserError, match=f"{name}.*: no field 'text', it has: body, id; name the one with the text"
    ):
        texts_of(tmp_path / name)


def test_zstandard_of_several_frames(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(jsonl(["one"])) + compress(jsonl(["two"])))
    assert texts_of(tmp_path / "a.jsonl.zst") == ["one", "two"]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS[1:])
def test_damaged_compression(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("a.jsonl" + suffix)
    whole = compress(jsonl([f"document {i * i}" for i in range(20_000)]))
    for size in (len(whole) - 3, len(whole) // 2, 10):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.jsonl.*: truncated"):
            texts_of(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match=r"a\.jsonl\.\w+: (damaged|cannot be read)"):
        texts_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        (b'{"text": "a"}\n["b"]\n', "line 2: got a JSON list, expected an object with 'text'"),
        (b'{"text": 3}\n', "line 1: field 'text' holds int, expected a string"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8 .byte 0xff"),
        (b'{"text": "a\\ud800"}\n', r"line 1: a lone surrogate .U\+D800"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}"):
        texts_of(tmp_path / "a.jsonl")


def test_replacing_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "a\\ud800"}\n')
    assert texts_of(tmp_path / "a.jsonl", errors="replace") == ["\ufffd", "a\ufffd"]


@pytest.mark.parametrize("before", [0, 3, 300_000])
def test_text_that_is_not_utf8(tmp_path: Path, before: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"line\n" * before + b"bad \xe9 byte\n")
    with pytest.raises(UserError, match=rf"a\.txt, line {before + 1}: not UTF-8 \(byte 0xe9\)"):
        texts_of(tmp_path / "a.txt")
    assert texts_of(tmp_path / "a.txt", errors="replace")[-1].endswith("bad \ufffd byte\n")


def test_bad_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    whole = parquet(["x"] * 50)
    for content in (whole[: len(whole) // 2], b"no parquet"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.parquet, after row 0: cannot be read as Parquet"):
            texts_of(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: field 'text' holds int"):
        texts_of(path)


def test_separated_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n<|endoftext|>three")
    found = [*Corpus(tmp_path / "a.txt", Reading(separator="<|endoftext|>"))]
    assert [document.text for document in found] == ["one", "two\nlines", "three"]
    assert found[2].origin.endswith("a.txt, line 6")


def test_separator_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_READ_BYTES", 7)
    (tmp_path / "a.txt").write_text("größe ==== zwei ==== drei")
    assert texts_of(tmp_path / "a.txt", separator=" ==== ") == ["größe", "zwei", "drei"]


@given(st.text(st.sampled_from("ab \n\t\r1.'é\u2028\x1c"), max_size=200))
@settings(max_examples=300, deadline=None)
def test_pieces_encode_like_the_whole(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """A long file is cut where no token can span, so its ids do not depend on the size of the pieces."""
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_CHARACTERS", 5)
        patch.setattr(reading, "_READ_BYTES", 11)
        pieces = [document.text for document in reading.FileReader(path, Reading())]
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in BPE.encode(piece)] == BPE.encode(text)


BPE = train_bpe(["ab \n\n\n a\n\n b  \n  a\t\tb\n\n\n\n'a 1. 1.é\r\n\r\n" * 50], vocab_size=330)


def test_long_files_come_in_pieces(tmp_path: Path) -> None:
    text = "A line of some length.\n\n" * 120_000
    (tmp_path / "a.txt").write_text(text)
    pieces = [*Corpus(tmp_path / "a.txt")]
    assert len(pieces) >= 10 and [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece.text for piece in pieces) == text
    line = int(pieces[1].origin.rsplit(" ", 1)[1])
    assert line == pieces[0].text.count("\n") + 1


def test_directories_are_walked_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl", "a.txt", ".hidden.txt", "b/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("jsonl") else name.encode())
    assert texts_of(tmp_path) == ["a.txt", "b/1.jsonl", "b/2.txt"]


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    for bad, message in [
        (tmp_path / "none.txt", "no file or directory at"),
        (tmp_path, r"holds no \.txt, \.jsonl or \.parquet file"),
        ([], "no input given"),
    ]:
        with pytest.raises(UserError, match=message):
            Corpus(bad)  # type: ignore[arg-type]
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"a\.csv: unknown kind of file"):
        Corpus(tmp_path / "a.csv")
    with pytest.raises(UserError, match="errors: got 'ignore'"):
        Reading(errors="ignore")


def test_split_by_hash_keeps_copies_together_and_its_share(tmp_path: Path) -> None:
    texts = [f"document number {i % 1000}" for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    parts = [(part, document.text) for part, document in Corpus(tmp_path / "a.jsonl").split(0.1)]
    assert [text for _, text in parts] == texts
    held = {text for part, text in parts if part == "val"}
    assert held.isdisjoint(text for part, text in parts if part == "train")
    assert abs(len(held) - 100) < 48  # five binomial deviations of 1,000 documents at 0.1


def test_split_of_few_text_files_takes_their_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    (tmp_path / "b.txt").write_text("é" * 50)
    parts = [(part, document.text) for part, document in Corpus(tmp_path).split(0.1)]
    assert parts == [
        ("train", ("0123456789" * 10)[:90]),
        ("val", "0123456789"),
        ("train", "é" * 45),
        ("val", "é" * 5),
    ]
    assert Corpus(tmp_path, Reading(separator="5")).method() == "hash"
    with pytest.raises(UserError, match="did you mean 'hash'"):
        Corpus(tmp_path).method("hesh")
    with pytest.raises(UserError, match="val_fraction: got 1"):
        Corpus(tmp_path).split(1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 0.9]))
@settings(max_examples=150, deadline=None)
def test_ends_of_files_in_pieces(
    tmp_path_factory: pytest.TempPathFactory, lines: list[int], fraction: float
) -> None:
    """However a file is cut into pieces, each part of it is one document that ends once, at its last piece."""
    root = tmp_path_factory.mktemp("tails")
    texts = [("abc\n" * count)[: 4 * count - count % 2] for count in lines]
    for number, text in enumerate(texts):
        (root / f"{number}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_CHARACTERS", 8)
        patch.setattr(reading, "_READ_BYTES", 8)
        parts = [*Corpus(root).split(fraction, "tail")]
    for name, of in (("train", slice(0, 1)), ("val", slice(1, 2))):
        expected = []
        for text in texts:
            cut = int(len(text) * (1 - fraction))
            expected.extend(part for part in (text[:cut], text[cut:])[of] if part)
        found, open_text = [], ""
        for part, document in parts:
            if part == name:
                open_text += document.text
                if document.ends:
                    found.append(open_text)
                    open_text = ""
        assert found == expected and not open_text


def test_progress_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["x" * 100] * 5000)))
    (tmp_path / "b.parquet").write_bytes(parquet(["y"] * 100))
    documents = Corpus(tmp_path)
    positions = [documents.read_bytes for _ in documents]
    assert positions == sorted(positions) and documents.read_bytes == documents.total_bytes


@pytest.fixture(scope="module")
def builtin() -> corpus.BuiltinCorpus:
    return corpus.builtin()


def test_builtin_is_large_enough_and_split(builtin: corpus.BuiltinCorpus) -> None:
    manifest = builtin.manifest
    assert manifest["bytes"] >= 1_000_000
    assert manifest["bytes"] == sum(len(text.encode()) for text in [*builtin.train, *builtin.val])
    assert (
        manifest["documents"] == len(builtin.train) + len(builtin.val) == len({*builtin.train, *builtin.val})
    )
    assert manifest["bytes"] == sum(kind["bytes"] for kind in manifest["kinds"].values())
    share = len(builtin.val) / manifest["documents"]
    assert 0.02 < share < 0.09  # 0.05 within five binomial deviations of about 2,000 documents
    assert manifest["python"].endswith(
        f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    )


def test_builtin_is_normalised(builtin: corpus.BuiltinCorpus) -> None:
    for text in [*builtin.train, *builtin.val]:
        assert text == corpus_normalise(text) and "\r" not in text and "\t" not in text


def corpus_normalise(text: str) -> str:
    from gptcore.data.builtin_corpus import normalise

    return normalise(text)


def test_normalise() -> None:
    assert corpus_normalise("\n a\t\x0cb \r\n\n\n\n\n\nc\x00d\u2028e\n") == " a     b\n\n\nc d e"


def test_builtin_repeats_itself_in_another_process(builtin: corpus.BuiltinCorpus) -> None:
    program = "from gptcore.data import corpus; print(corpus.builtin().manifest['sha256'])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == builtin.manifest["sha256"]


def test_builtin_stops_at_its_cap(builtin: corpus.BuiltinCorpus) -> None:
    small = corpus.builtin(max_bytes=500_000, val_fraction=0.0)
    assert 400_000 < small.manifest["bytes"] <= 500_000 and not small.val
    assert small.train[:20] == [text for text in small.train[:20] if text in {*builtin.train, *builtin.val}]
    with pytest.raises(UserError, match="brings no text"):
        corpus.builtin(max_bytes=10)


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, gptcore.data, gptcore.data.corpus, gptcore.data.tokenizer, gptcore.report.progress\n"
        "heavy = {'numpy', 'torch', 'tokenizers', 'pyarrow', 'zstandard'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
