"""The instructions that matrix kernels are made of, against plain products: layouts, swizzles and copies."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


def _product(
    simt: ModuleType, a: torch.Tensor, b: torch.Tensor, row_bytes: int, transposed: bool
) -> torch.Tensor:
    d = torch.full((16, 8), torch.nan)
    name = str(a.dtype).removeprefix("torch.")
    simt.mma_product(name, a.data_ptr(), b.data_ptr(), d.data_ptr(), a.shape[1], row_bytes, transposed)
    return d


@pytest.mark.parametrize("row_bytes", [32, 64, 128, 192, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tile_product_is_the_plain_one(simt: ModuleType, dtype: torch.dtype, row_bytes: int) -> None:
    # The last 16 bytes of every row lie behind the matrix and are filled with zeros.
    depth = (row_bytes - 16) // dtype.itemsize
    a, b = (torch.randn(rows, depth).to(dtype) for rows in (16, 8))
    if dtype == torch.float32:  # what tf32 holds exactly
        a, b = (x.to(torch.bfloat16).float() for x in (a, b))
    expected = a.double() @ b.double().T
    got = _product(simt, a.contiguous(), b.contiguous(), row_bytes, False)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_transposed_operand_is_the_plain_one(simt: ModuleType, dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 8).to(dtype)
    got = _product(simt, a, b, 64, True)
    torch.testing.assert_close(got.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_ignores_what_lies_below_its_bits(simt: ModuleType) -> None:
    a, b = torch.zeros(16, 4), torch.zeros(8, 4)
    a[0, 0], b[0, 0] = 1 + 2.0**-10 + 2.0**-11, 1
    assert _product(simt, a, b, 32, False)[0, 0] == 1 + 2.0**-10


@pytest.mark.parametrize("row_bytes", [32, 64, 128, 192, 384, 512])
def test_swizzled_chunks_meet_no_bank_twice(simt: ModuleType, row_bytes: int) -> None:
    chunks = row_bytes // 16
    place = [[simt.swizzled(row_bytes, row, chunk) for chunk in range(chunks)] for row in range(16)]
    assert sorted(x for row in place for x in row) == list(range(0, 16 * row_bytes, 16))
    for chunk in range(chunks):
        for first in (0, 8):  # a matrix of ldmatrix: eight rows of one column
            banks = {place[row][chunk] % 128 for row in range(first, first + 8)}
            assert len(banks) == 8
