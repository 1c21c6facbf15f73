from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.ops.crc32c import crc32c, crc32c_reference
from tests.tolerance import assert_same_for_threads

# RFC 3720, appendix B.4, and the check value of the catalogues of CRCs.
PUBLISHED = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
]
BLOCK, CHUNK = 3 * 1024, 256 << 10  # of the kernel


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("data, crc", PUBLISHED)
def test_published_vectors(isa: str, data: bytes, crc: int) -> None:
    assert crc32c(array(data)) == crc == crc32c_reference(data)


def test_every_size_and_alignment_matches_the_reference(isa: str) -> None:
    data = noise(BLOCK + 80)
    for size in [*range(70), BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 63]:
        for start in (0, 1, 8, 13):
            assert crc32c(array(data)[start : start + size]) == crc32c_reference(data[start : start + size])


def test_several_chunks_match_the_reference(isa: str) -> None:
    for size in (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + BLOCK + 5):
        data = noise(size, size)
        assert crc32c(array(data)) == crc32c_reference(data)


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_a_message_in_two_parts(data: bytes, cut: int) -> None:
    whole = crc32c_reference(data)
    assert crc32c(array(data[cut:]), crc32c(array(data[:cut]))) == whole
    assert crc32c_reference(data[cut:], crc32c_reference(data[:cut])) == whole


@pytest.mark.parametrize("size", [0, 1, 63, BLOCK + 7, CHUNK, 2 * CHUNK + 100, 5 * CHUNK + 1])
@pytest.mark.parametrize("shift", [0, 4, 63])
def test_the_copy_is_whole_and_nothing_else_is_written(isa: str, size: int, shift: int) -> None:
    data = torch.from_numpy(array(noise(size + 1))[:size].copy())
    room = torch.full((size + 200,), 0xA5, dtype=torch.uint8)
    out = room[shift : shift + size]
    assert crc32c(data, out=out) == crc32c(data)
    assert torch.equal(out, data)
    assert bool((room[:shift] == 0xA5).all()) and bool((room[shift + size :] == 0xA5).all())


def test_same_bits_for_every_thread_count_and_run(threads: None) -> None:
    data = torch.from_numpy(array(noise(9 * CHUNK + 11)).copy())

    def both() -> list[torch.Tensor]:
        out = torch.empty_like(data)
        return [torch.tensor(crc32c(data, 3, out=out)), out]

    assert_same_for_threads(both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_bytes_of_any_dtype(dtype: torch.dtype) -> None:
    x = (torch.rand(5, 7) * 100).to(dtype)
    data = x.view(torch.uint8).numpy().tobytes()
    out = torch.empty(len(data), dtype=torch.uint8)
    assert crc32c(x, out=out) == crc32c_reference(data) and out.numpy().tobytes() == data


def test_every_flipped_bit_is_found() -> None:
    data = bytearray(noise(4000))
    crc = crc32c(array(bytes(data)))
    found = {crc}
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        found.add(crc32c(array(bytes(data))))
        data[bit // 8] ^= 1 << bit % 8
    assert len(found) == 8 * len(data) + 1, "and no two of them have the same"


def test_it_is_not_the_other_crc() -> None:
    assert crc32c(array(b"gptcore")) != zlib.crc32(b"gptcore")


BAD = [
    (lambda: crc32c(torch.zeros(4, 4).T[:, :2]), ValueError, "'x': got a tensor with gaps"),
    (lambda: crc32c(torch.zeros(4), 1 << 32), ValueError, "'initial': got 4294967296"),
    (lambda: crc32c(torch.zeros(4), -1), ValueError, "'initial': got -1"),
    (lambda: crc32c(torch.zeros(4), out=torch.zeros(5)), ValueError, "'out': got 20 bytes, expected .* 16"),
    (lambda: crc32c(torch.zeros(4), out=np.frombuffer(bytes(16), np.uint8)), ValueError, "'out': got a read-only"),
    (lambda: crc32c(None), TypeError, "'x': got None"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_memory_of_the_source_is_refused() -> None:
    x = torch.zeros(100)
    for out in (x, x[1:], x.view(torch.uint8)[4:]):
        with pytest.raises(ValueError, match="'out': got"):
            crc32c(x[: out.numel()] if out.dtype == x.dtype else x[:99], out=out)
    assert bool((x == 0).all())
