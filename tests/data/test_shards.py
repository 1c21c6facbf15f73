"""Shards: what is written is read; damage, truncation, a full disk and a kill are told and spoil nothing."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.data import shards
from gptcore.data.characters import ByteTokenizer, CharacterTokenizer
from gptcore.data.dataset import TokenDataset
from gptcore.data.shards import ArrayShard, ShardWriter, TokenShard
from gptcore.errors import UserError


def write(
    path: Path, documents: list[list[int]], tokenizer: ByteTokenizer | CharacterTokenizer | None = None
) -> Path:
    with ShardWriter(path, tokenizer or ByteTokenizer()) as writer:
        for document in documents:
            writer.append(document)
    return path


@given(st.lists(st.lists(st.integers(0, 255), max_size=30), max_size=12))
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.tokens"
    shard = TokenShard(write(path, documents))
    stream = [token for document in documents for token in (*document, 256)]
    assert shard.read(0, shard.tokens).tolist() == stream
    assert shard.document_ends.tolist() == np.cumsum([len(d) + 1 for d in documents], dtype=int).tolist()
    assert (shard.documents, shard.vocab_size, shard.eot) == (len(documents), 257, 256)
    assert shard.text_bytes == sum(map(len, documents))
    assert shard.fingerprint == ByteTokenizer().fingerprint
    assert shard.token_bytes.tolist() == [1] * 256 + [0]
    assert shard.read(0, shard.tokens).dtype == np.uint16


def test_documents_in_pieces_and_without_end_of_text(tmp_path: Path) -> None:
    characters = CharacterTokenizer("abé", eot=False)
    with ShardWriter(tmp_path / "a.tokens", characters) as writer:
        writer.append([0, 1], ends=False)
        writer.append([2])
        writer.append([1], ends=False)  # the last document ends with the shard
    shard = TokenShard(tmp_path / "a.tokens")
    assert shard.read(0, 4).tolist() == [0, 1, 2, 1] and shard.document_ends.tolist() == [3, 4]
    assert shard.eot is None and shard.text_bytes == 5


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    characters = CharacterTokenizer("".join(map(chr, range(0x10000, 0x10000 + 66_000))))
    shard = TokenShard(write(tmp_path / "a.tokens", [[0, 65_999, 65_536]], characters))
    assert shard.read(0, 4).dtype == np.uint32 and shard.read(0, 4).tolist() == [0, 65_999, 65_536, 66_000]


def test_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids beyond the first MiB, and a block that is read only in part."""
    ids = np.random.default_rng(0).integers(0, 256, 1_300_000)
    path = write(tmp_path / "a.tokens", [ids.tolist()])
    shard = TokenShard(path)
    for start, stop in [(0, 10), (524_280, 524_300), (1_299_990, 1_300_001), (7, 7)]:
        assert shard.read(start, stop)[: 1_300_000 - start].tolist() == ids[start:stop].tolist()
    shard.verify()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 99)])
def test_reading_outside_is_refused(tmp_path: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="expected 0 to 4"):
        TokenShard(write(tmp_path / "a.tokens", [[1, 2, 3]])).read(start, stop)


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    """Flip each byte of the fields, of the checksums and of a sample of the rest, one at a time."""
    path = write(tmp_path / "a.tokens", [list(range(200)), list(range(50))])  # 252 ids need no padding
    good = path.read_bytes()
    header = [*range(140), *range(140, 4064, 97), *range(4064, 4096)]
    for position in [*header, *range(4096, len(good), 3)]:
        bad = bytearray(good)
        bad[position] ^= 0x20
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"not a token shard|shard format|damaged token shard"):
            TokenShard(path).verify()


def test_truncation_at_any_length_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [list(range(200))])
    good = path.read_bytes()
    for size in [0, 4, 8, 100, 4095, 4096, 4097, len(good) - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match=r"truncated|not a token shard"):
            TokenShard(path)
    path.write_bytes(good + b"x")
    with pytest.raises(UserError, match="longer than it says"):
        TokenShard(path)


def test_damage_in_one_block_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [[1] * 1_200_000])
    with open(path, "r+b") as file:
        file.seek(4096 + (1 << 20) + 5)
        file.write(b"\x07")
    shard = TokenShard(path)
    assert shard.read(0, 1000).sum() == 1000
    with pytest.raises(UserError, match="MiB 1 of its ids differs"):
        shard.read(600_000, 600_010)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token shard at"):
        TokenShard(tmp_path / "none.tokens")
    (tmp_path / "text").write_text("hello " * 1000)
    with pytest.raises(UserError, match="not a token shard"):
        TokenShard(tmp_path / "text")
    with pytest.raises(UserError, match="cannot be read"):
        TokenShard(tmp_path)


def test_bad_ids_leave_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [[1, 2]])
    before = path.read_bytes()
    for ids in ([257], [-1]):
        with (
            pytest.raises(ValueError, match="outside 0 to 256"),
            ShardWriter(path, ByteTokenizer()) as writer,
        ):
            writer.append(ids)
    with pytest.raises(ValueError, match="2 dimensions"), ShardWriter(path, ByteTokenizer()) as writer:
        writer.append(np.zeros((2, 2), np.int64))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with ShardWriter(path, ByteTokenizer()) as writer:
        writer.append([1, 2, 3])
        with (
            pytest.raises(UserError, match="another process is writing it"),
            ShardWriter(path, ByteTokenizer()),
        ):
            pass
    assert TokenShard(path).tokens == 4


WRITER = """
import sys
from gptcore.data.characters import ByteTokenizer
from gptcore.data.shards import ShardWriter
with ShardWriter(sys.argv[1], ByteTokenizer()) as writer:
    for _ in range(int(sys.argv[2])):
        writer.append([7] * 100_000)
        print("more", flush=True)
"""


def test_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk: the same failing write, with no mount needed."""
    path = write(tmp_path / "a.tokens", [[1, 2]])
    before = path.read_bytes()
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))\n"
        "from gptcore.errors import UserError\ntry:\n"
        + "".join(f"    {line}\n" for line in WRITER.strip().splitlines())
        + "except UserError as error:\n    print(error); sys.exit(2)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(path), "20"], capture_output=True, text=True)
    assert answer.returncode == 2, answer.stderr
    last = answer.stdout.splitlines()[-1]
    assert last == f"cannot write {path}: the file-size limit is reached; what was there before is unchanged"
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_no_space_has_its_sentence() -> None:
    from gptcore.data.atomic import write_error

    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert "the disk is full" in str(write_error(caught.value, Path("a")))


def test_kill_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [[1, 2]])
    before = path.read_bytes()
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "10000"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(20):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert path.read_bytes() == before
    write(path, [[3]])  # what the killed writer left is taken over
    assert TokenShard(path).read(0, 2).tolist() == [3, 256] and list(tmp_path.iterdir()) == [path]


def test_opening_does_not_read_the_ids(tmp_path: Path) -> None:
    """A shard opens in about the time of its header: 64 MB of ids are mapped, not read."""
    path = tmp_path / "a.tokens"
    with ShardWriter(path, ByteTokenizer()) as writer:
        for _ in range(4):
            writer.append(np.zeros(8_000_000, np.int64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    begin = time.perf_counter()
    shard = TokenShard(path)
    took = time.perf_counter() - begin
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert shard.tokens == 32_000_004
    assert faults < 1000 and took < 1.0  # reading them all would touch 15,625 pages


def test_data_set_of_several_shards(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.tokens", [[i] * (i + 1)]) for i in range(3)]
    data = TokenDataset.open(paths)
    assert (data.tokens, data.documents, data.text_bytes, data.vocab_size, data.eot) == (9, 3, 6, 257, 256)
    other = write(tmp_path / "other.tokens", [[0]], CharacterTokenizer("a"))
    with pytest.raises(UserError, match="vocabulary mismatch"):
        TokenDataset.open([paths[0], other])
    with pytest.raises(UserError, match="at least one token shard"):
        TokenDataset([])
    with pytest.raises(UserError, match="no prepared data here"):
        TokenDataset.open(tmp_path)


def test_array_shard_finds_documents() -> None:
    shard = ArrayShard([1, 2, 9, 3, 9, 4], eot=9, vocab_size=10)
    assert shard.document_ends.tolist() == [3, 5, 6]
    assert ArrayShard(np.zeros(4, np.uint8)).document_ends.tolist() == [4]
    with pytest.raises(ValueError, match="expected 0 to 8"):
        ArrayShard([9], vocab_size=9)
    with pytest.raises(TypeError, match="float64"):
        ArrayShard(np.zeros(3))


def test_format_constants() -> None:
    """The layout is a promise to files that exist: a change needs a new version."""
    assert (shards.MAGIC, shards.VERSION, shards.HEADER_BYTES, shards.BLOCK_BYTES) == (
        b"gptcore\0",
        1,
        4096,
        1 << 20,
    )
