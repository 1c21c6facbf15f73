"""Attention's tables on CUDA: tiles that fit every device, and keys split by their number alone."""

from __future__ import annotations

from types import ModuleType

import pytest

SHARED = 163 << 10  # a block's on sm_80, the least of those compiled for


@pytest.mark.parametrize(("element_bytes", "tf32"), [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("plain", [False, True])
def test_tiles_fit_head_sizes_and_shared_memory(
    simt: ModuleType, element_bytes: int, tf32: bool, plain: bool
) -> None:
    for size in range(1, 257):
        dim, rows, threads, keys, shared = simt.forward_mma_shape(element_bytes, size, plain, tf32)
        assert size <= dim < 2 * max(size, 32)
        assert rows % 16 == 0 and keys % 16 == 0 and threads % 32 == 0
        # Swizzled tiles begin at multiples of 1,024 bytes, and threads share their chunks evenly.
        for tile in (rows, keys):
            assert tile * dim * element_bytes % 1024 == 0 and tile * dim * element_bytes // 16 % threads == 0
        assert shared == (rows + 2 * keys) * dim * element_bytes <= SHARED


def test_decoding_fits_shared_memory(simt: ModuleType) -> None:
    for dim in (64, 128, 256):
        for element_bytes in (2, 4):
            for paged in (False, True):
                assert simt.decode_shared_bytes(dim, element_bytes, paged) <= SHARED


@pytest.mark.parametrize("keys", [0, 1, 63, 256, 257, 4096, 16384, 16385, 100_001, 1 << 20])
@pytest.mark.parametrize("left", [-1, 0, 100, 5000])
def test_parts_cover_what_is_seen(simt: ModuleType, keys: int, left: int) -> None:
    begin, part_keys, parts, row_blocks, grid = simt.decode_plan(3, 4, keys, 12, 2, left)
    assert begin == (0 if left < 0 else min(max(keys - 4 - left, 0), keys))
    assert part_keys % 64 == 0 and part_keys >= 256 and 1 <= parts <= 64
    assert begin + parts * part_keys >= keys
    assert parts == 1 or begin + (parts - 1) * part_keys < keys
    assert row_blocks == 2 and grid == parts
    assert simt.decode_plan(1, 4, keys, 12, 2, left)[:3] == (begin, part_keys, parts)


@pytest.mark.parametrize("queries", [1, 16, 700])
@pytest.mark.parametrize("left", [-1, 0, 300, 5000, 1 << 40])
def test_the_grid_over_pages_has_the_parts_of_every_length(simt: ModuleType, queries: int, left: int) -> None:
    for room in (0, 16, 256, 272, 5000, 16400, 100_000):
        grid, max_parts = simt.paged_parts(queries, room, 8, 1, left)
        assert 1 <= grid <= max_parts <= 64 and (queries < 700 or max_parts == 1)
        near = [room - 1, room // 2, room // 3, 16384, 16385, 257, 256, 1, 0]
        for length in (room, *(n for n in near if 0 <= n <= room)):
            begin, part_keys, parts = simt.split_keys(queries, length, min(left, 1 << 29), max_parts)
            assert parts <= grid and begin + parts * part_keys >= length


def test_many_queries_are_not_decoding(simt: ModuleType) -> None:
    assert simt.decode_plan(1, 17, 4096, 8, 8, -1) is None
    assert simt.decode_plan(1, 16, 4096, 8, 8, -1) is not None


def test_packed_documents_are_decoding_where_they_are_short_on_the_average(simt: ModuleType) -> None:
    assert simt.decodes_packed(100, 400) and not simt.decodes_packed(100, 401)
    assert simt.decodes_packed(1, 1) and simt.decodes_packed(0, 0) and not simt.decodes_packed(0, 1)
