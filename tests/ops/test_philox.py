from __future__ import annotations

import numpy as np
import pytest
import torch

from gptcore import ops
from gptcore.ops.philox import philox, philox_reference
from tests.tolerance import assert_same_for_threads

# The lines "philox4x32 10" of Random123's tests/kat_vectors: counter, key, result.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _words(rows: object) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


def _counters(count: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (count, 4)).to(torch.int32)


@pytest.mark.parametrize("counter, key, expected", PUBLISHED)
def test_published_vectors_in_every_lane_and_in_the_scalar_tail(isa, counter, key, expected) -> None:
    seed = key[0] | key[1] << 32
    got = philox(_words([counter] * 37), seed)
    assert torch.equal(got, _words([expected] * 37))
    assert philox_reference(_words([counter]), seed).tolist() == [list(expected)]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**64 - 1, 2**63, -(2**63), 0x0123456789ABCDEF])
def test_matches_the_reference_at_every_length(isa: str, seed: int) -> None:
    for count in (0, 1, 3, 4, 5, 15, 16, 17, 31, 64, 100):
        counters = _counters(count)
        assert torch.equal(
            philox(counters, seed).to(torch.int64) & 0xFFFFFFFF, philox_reference(counters, seed)
        )


def test_the_reference_takes_one_seed_for_each_counter() -> None:
    counters, seeds = _counters(5), torch.tensor([0, 1, -1, 2**40, -(2**63)])
    together = philox_reference(counters, seeds)
    for i, seed in enumerate(seeds.tolist()):
        assert torch.equal(together[i], philox_reference(counters[i], seed))


def test_same_bits_for_every_thread_count_and_run(threads: None) -> None:
    counters = _counters(150_000)
    assert_same_for_threads(lambda: [philox(counters, 7)])


def test_successive_counters_give_even_and_uncorrelated_bits() -> None:
    count = 1 << 16
    counters = torch.zeros(count, 4, dtype=torch.int32)
    counters[:, 0] = torch.arange(count)
    words = ops.philox(counters, 42).to(torch.int64) & 0xFFFFFFFF
    bits = (words[..., None] >> torch.arange(32) & 1).reshape(count, 128).double() * 2 - 1
    # Means and products of signs are of the size 1/256 by chance; 8,256 of them stay under 5 times that.
    assert bits.mean(0).abs().max().item() < 5 / 256
    assert (bits.T @ bits / count - torch.eye(128)).abs().max().item() < 5.5 / 256
    assert (bits[1:] * bits[:-1]).mean(0).abs().max().item() < 5 / 256


def test_numpy_in_place_opcheck_and_compile() -> None:
    counters = _counters(21)
    expected = philox(counters, 3)
    array = counters.numpy().copy()
    got = philox(array, 3)
    assert isinstance(got, np.ndarray) and np.array_equal(got, expected.numpy())
    assert philox(array, 3, out=array) is array and np.array_equal(array, expected.numpy())
    torch.library.opcheck(torch.ops.gptcore.philox.default, (counters, 3))
    assert torch.equal(torch.compile(lambda c: ops.philox(c, 3) + 1, fullgraph=True)(counters), expected + 1)


BAD = [
    (lambda: philox(torch.zeros(4, 4), 0), TypeError, "'counters': got float32, expected int32"),
    (lambda: philox(torch.zeros(4, 3, dtype=torch.int32), 0), ValueError, "'counters': got shape"),
    (lambda: philox(_counters(4).T, 0), ValueError, "'counters': got"),
    (lambda: philox(_counters(4), 2**64), ValueError, "'seed': got 18446744073709551616"),
    (lambda: philox(_counters(4), 0, out=_counters(5)), ValueError, "'out'.*'counters'"),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()
