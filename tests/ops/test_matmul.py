from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend
from gptcore.ops.matmul import matmul, matmul_reference
from tests.tolerance import ROUNDOFF, assert_same_for_threads, same_bits

DTYPES = [torch.float32, torch.bfloat16]


def _operands(m: int, n: int, k: int, dtype: torch.dtype, transpose_a: bool, transpose_b: bool):
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    return (a.mT.contiguous() if transpose_a else a), (b.mT.contiguous() if transpose_b else b)


def _check(a, b, out=None, **options) -> None:
    """Elementwise. Terms of random sign: partial sums reach |out| + 2 deviations of the random walk of products,
    each of the K + 1 additions rounds such a number, and the roundings add as a random walk in turn; 4 deviations of
    that cover the worst of 1e5 elements. Then one rounding to the result's dtype."""
    bias = options.pop("bias", None)
    wide = {"bias": None if bias is None else bias.double(), "out": None if out is None else out.double()}
    exact = matmul_reference(a.double(), b.double(), **wide, **options)
    shape = {k: v for k, v in options.items() if k != "accumulate"}
    walk = matmul_reference(a.double().square(), b.double().square(), **shape).sqrt()
    start = out.double().abs() if options.get("accumulate") else 0.0 if bias is None else bias.double().abs()
    depth = a.shape[0 if options.get("transpose_a") else 1]
    target = None if out is None else out.clone()
    got = matmul(a, b, bias=bias, out=target, **options)
    assert target is None or got is target
    bound = 4 * ROUNDOFF[torch.float32] * (depth + 1) ** 0.5 * (start + 2 * walk)
    bound += torch.finfo(got.dtype).eps / 2 * exact.abs() * 1.01
    worst = ((got.double() - exact).abs() - bound).max().item() if got.numel() else 0.0
    assert worst <= 0, f"error exceeds its bound by {worst:.3e}"


SHAPES = [
    *[(m, n, k) for m in (1, 3, 17) for n in (1, 33) for k in (1, 3, 16, 33, 65)],
    (64, 70, 96), (65, 47, 40), (33, 64, 64), (130, 99, 1100), (32, 96, 2100), (5, 7, 0), (20, 4100, 35),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_for_every_shape_and_layout(isa: str, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        for transpose_a, transpose_b in [(False, False), (False, True), (True, False), (True, True)]:
            a, b = _operands(m, n, k, dtype, transpose_a, transpose_b)
            options = {"transpose_a": transpose_a, "transpose_b": transpose_b}
            _check(a, b, **options)
            _check(a, b, torch.randn(m, n), accumulate=True, **options)
            _check(a, b, bias=torch.randn(n).to(dtype), **options)
            _check(a, b, torch.randn(m, n), bias=torch.randn(n), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_size_on_every_isa(isa: str, dtype: torch.dtype) -> None:
    # Each dimension from none to beyond two AVX-512 vectors, the others small; both bodies of few rows.
    for size in range(34):
        for shape in [
            (size, 7, 9),
            (5, size, 9),
            (5, 7, size),
            (70, size, 3),
            (70, 3, size),
            (1, size, 9),
            (1, 7, size),
        ]:
            for transpose_b in (False, True):
                a, b = _operands(*shape, dtype, False, transpose_b)
                _check(a, b, transpose_b=transpose_b)
                _check(a, b, bias=torch.randn(shape[1]).to(dtype), transpose_b=transpose_b)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 80), n=st.integers(0, 80), k=st.integers(0, 80),
    ta=st.booleans(), tb=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16),
    start=st.sampled_from(["none", "accumulate", "bias"]), gap=st.integers(0, 5), offset=st.integers(0, 3),
)  # fmt: skip
def test_any_shape_stride_and_alignment(m, n, k, ta, tb, dtype, seed, start, gap, offset) -> None:
    torch.manual_seed(seed)

    def strided(rows: int, columns: int, kind: torch.dtype) -> torch.Tensor:
        base = torch.randn(rows * (columns + gap) + offset).to(kind)
        return base[offset:].view(rows, columns + gap)[:, :columns]

    a, b = strided(*((k, m) if ta else (m, k)), dtype), strided(*((n, k) if tb else (k, n)), dtype)
    options = {"transpose_a": ta, "transpose_b": tb, "accumulate": start == "accumulate"}
    bias = strided(1, n, dtype)[0] if start == "bias" else None
    _check(a, b, strided(m, n, torch.float32), bias=bias, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(isa: str, dtype: torch.dtype) -> None:
    for k in (40, 768):
        x, weight = torch.randn(64, k).to(dtype), torch.randn(100, k).to(dtype)
        whole = matmul(x, weight, transpose_b=True)
        for rows in (1, 2, 3, 4, 5, 15, 16, 17, 33, 50, 63):
            assert same_bits(matmul(x[:rows], weight, transpose_b=True), whole[:rows])
        assert same_bits(matmul(x[37:38], weight, transpose_b=True), whole[37:38])
        assert same_bits(matmul(x, weight[:53], transpose_b=True), whole[:, :53])
        assert same_bits(matmul(x[20:41], weight, transpose_b=True), whole[20:41])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch_with_rows_of_weight_across(
    isa: str, dtype: torch.dtype
) -> None:
    for k in (40, 768):
        x, weight = torch.randn(64, k).to(dtype), torch.randn(k, 300).to(dtype)
        whole = matmul(x, weight)
        for rows in (2, 3, 7, 8, 9, 16, 33, 63):
            assert same_bits(matmul(x[:rows], weight), whole[:rows])
        assert same_bits(matmul(x[20:41], weight), whole[20:41])
        assert same_bits(matmul(x, weight[:, :131]), whole[:, :131])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_run(isa: str, threads: None, dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 130).to(dtype), torch.randn(2000, 130).to(dtype)
    dy, tokens = torch.randn(600, 200).to(dtype), torch.randn(600, 330).to(dtype)
    start, bias = torch.randn(200, 330), torch.randn(2000).to(dtype)

    def step() -> list[torch.Tensor]:
        return [
            matmul(x, weight, bias=bias, transpose_b=True),
            matmul(dy[:, :130], weight, bias=bias, transpose_b=True),
            matmul(x, weight.t().contiguous(), bias=bias),
            matmul(bias[None], weight),
            matmul(dy, tokens, out=start.clone(), accumulate=True, transpose_a=True),
        ]

    assert_same_for_threads(step)


def test_accumulation_keeps_what_bf16_sums_would_lose(isa: str) -> None:
    # 512 products of 1 x 2^-8 on top of 256: each alone is below half a bf16 step of the sum.
    ones, small = torch.ones(512, 3).bfloat16(), torch.full((512, 2), 2.0**-8).bfloat16()
    out = torch.full((3, 2), 256.0)
    matmul(ones, small, out=out, accumulate=True, transpose_a=True)
    assert torch.equal(out, torch.full((3, 2), 258.0))


def test_special_values_stay_in_their_rows_and_columns(isa: str) -> None:
    for dtype in DTYPES:
        for m in (5, 70):
            a, b = torch.randn(m, 50).to(dtype), torch.randn(40, 50).to(dtype)
            clean = matmul(a, b, transpose_b=True)
            a[1, 3], b[4, 7] = float("nan"), float("inf")
            got = matmul(a, b, transpose_b=True)
            keep = [r for r in range(m) if r != 1]
            assert got[1].isnan().all() and not got[keep][:, 4].isfinite().any()
            others = [c for c in range(40) if c != 4]
            assert same_bits(got[keep][:, others], clean[keep][:, others])


def test_numpy_arrays_give_torch_bits() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    a, b = torch.randn(4, 20), torch.randn(6, 20)
    got = matmul(a.numpy(), b.numpy(), transpose_b=True)
    assert isinstance(got, np.ndarray)
    assert same_bits(torch.from_numpy(got), matmul(a, b, transpose_b=True))
    half = matmul(
        a.numpy().astype(ml_dtypes.bfloat16), b.numpy().astype(ml_dtypes.bfloat16), transpose_b=True
    )
    expected = matmul(a.bfloat16(), b.bfloat16(), transpose_b=True)
    assert np.array_equal(half.view(np.uint16), expected.view(torch.uint16).numpy())


def test_registration_and_compile() -> None:
    a, b = torch.randn(3, 8), torch.randn(5, 8)
    torch.library.opcheck(torch.ops.gptcore.matmul.default, (a, b, None, False, True))
    torch.library.opcheck(torch.ops.gptcore.matmul.default, (a, b, torch.randn(5), False, True))

    def product(x, w):
        return matmul(x, w, transpose_b=True) + 1

    assert same_bits(torch.compile(product, fullgraph=True)(a, b), product(a, b))


def test_scratch_stays_small_for_a_long_product() -> None:
    # The whole of a, packed, would be 67 MB; blocks of it are 8 MB and what tasks hold beside them.
    before = backend.extension().scratch_bytes()
    dy, x = torch.randn(16384, 2048).bfloat16(), torch.randn(16384, 16).bfloat16()
    matmul(dy, x, out=torch.zeros(2048, 16), transpose_a=True)
    assert backend.extension().scratch_bytes() - before < 12 << 20


F32 = torch.randn(3, 4)
HALF = F32.bfloat16()
BAD = [
    (lambda: matmul(F32.double(), F32, transpose_b=True), TypeError, "'a': got float64"),
    (lambda: matmul(F32, F32.bfloat16(), transpose_b=True), TypeError, "'b': got bfloat16, expected float32"),
    (lambda: matmul(F32, F32), ValueError, "'b'.*depth of 4"),
    (lambda: matmul(F32, F32, transpose_b=True, bias=F32[0]), ValueError, "'bias'.*expected.*\\(3,\\)"),
    (lambda: matmul(F32, F32, transpose_b=True, bias=HALF[:, 0]), TypeError, "'bias': got bfloat16"),
    (lambda: matmul(F32, F32, transpose_b=True, bias=F32[:, 0]), ValueError, "'bias'.*contiguous"),
    (
        lambda: matmul(F32, F32, transpose_b=True, bias=F32[0, :3], accumulate=True, out=torch.zeros(3, 3)),
        ValueError,
        "'bias'.*none where the product is accumulated",
    ),
    (lambda: matmul(F32[0], F32), ValueError, "got 1 and 2 dimensions, expected 2 and 2"),
    (lambda: matmul(F32, F32, transpose_b=True, out=torch.empty(3, 4)), ValueError, "'out'.*expected.*\\(3, 3\\)"),
    (lambda: matmul(F32, F32, transpose_b=True, accumulate=True), ValueError, "'out': got None"),
    (
        lambda: matmul(HALF, HALF, transpose_b=True, accumulate=True, out=torch.empty(3, 3).bfloat16()),
        ValueError,
        "f32 to accumulate",
    ),
    (lambda: matmul(torch.randn(8, 8)[::2, ::2], F32, transpose_b=True), ValueError, "'a'.*contiguous dimension"),
    (lambda: matmul(torch.randn(3, 4, requires_grad=True), F32, transpose_b=True), RuntimeError, "grad"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()
