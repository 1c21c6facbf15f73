from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend, ops
from gptcore.ops.rotary import rotary, rotary_reference, rotary_tables
from tests.strides import EDGES, within_larger
from tests.tolerance import assert_same_for_threads, check_against_float64, same_bits

DTYPES = [torch.float32, torch.bfloat16]


def _both(cos, sin, **options):
    """Kernel and reference as functions of x; the reference computes in float32 at least, as the kernel does."""

    def reference(x):
        wide = x if x.dtype == torch.float64 else x.float()
        return rotary_reference(wide, cos, sin, **options).to(x.dtype)

    return lambda x: rotary(x, cos, sin, **options), reference


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_every_width_on_every_isa(isa: str, dtype: torch.dtype, interleaved: bool) -> None:
    for half in [*range(1, 18), 31, 32, 33, 64]:
        for rest in (0, 3):
            x = torch.randn(2, 3, 2, 2 * half + rest).to(dtype)
            cos, sin = rotary_tables(9, 2 * half)
            kernel, reference = _both(cos, sin, interleaved=interleaved, position=5)
            check_against_float64(kernel, reference, [x], [torch.randn(x.shape)])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 4), st.integers(2, 40)),
    packed=st.booleans(),
    fraction=st.floats(0.05, 1.0),
    interleaved=st.booleans(),
    inverse=st.booleans(),
    position=st.sampled_from(["offset", "shared", "own"]),
    dtype=st.sampled_from(DTYPES),
    edges=EDGES,
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_option(
    shape, packed, fraction, interleaved, inverse, position, dtype, edges, seed
) -> None:
    torch.manual_seed(seed)
    batch, length, _, size = shape
    x = torch.randn(shape[1:] if packed else shape).to(dtype)
    cos, sin = rotary_tables(20, max(2, int(size * fraction) // 2 * 2), base=100.0)
    own = (length,) if packed or position == "shared" else (batch, length)
    where = 7 if position == "offset" else torch.randint(20, own, dtype=torch.int32)
    both = _both(cos, sin, interleaved=interleaved, inverse=inverse, position=where)
    kernel, reference = (within_larger(function, edges) for function in both)
    check_against_float64(kernel, reference, [x], [torch.randn(*x.shape[:-1], size + sum(edges))])


@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_turns_back_and_length_is_kept(interleaved: bool) -> None:
    x = torch.randn(2, 50, 3, 64)
    cos, sin = rotary_tables(50, 64)
    y = rotary(x, cos, sin, interleaved=interleaved)
    back = rotary(y, cos, sin, interleaved=interleaved, inverse=True)
    # Two rotations, each two products and a sum of operands of at most |x|.
    assert (back - x).abs().max() <= 8 * 2.0**-24 * x.abs().max()
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    cos, sin = rotary_tables(100, 32)
    scores = [
        (rotary(q, cos, sin, position=p + 11) * rotary(k, cos, sin, position=p)).sum().item()
        for p in (0, 40, 88)
    ]
    assert max(scores) - min(scores) < 1e-4


def test_special_values_stay_in_their_pair() -> None:
    cos, sin = rotary_tables(4, 8)
    x = torch.ones(1, 4, 1, 8)
    clean = rotary(x, cos, sin)
    x[0, 2, 0, 1] = float("nan")
    got = rotary(x, cos, sin)
    assert got[0, 2, 0, [1, 5]].isnan().all()
    got[0, 2, 0, [1, 5]] = clean[0, 2, 0, [1, 5]]
    assert same_bits(got, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_run(threads: None, dtype: torch.dtype) -> None:
    x = torch.randn(2, 200, 4, 64).to(dtype)
    cos, sin = rotary_tables(200, 64)
    assert_same_for_threads(lambda: [rotary(x, cos, sin), rotary(x, cos, sin, interleaved=True)])


def test_slices_of_a_fused_projection_and_misaligned_memory() -> None:
    qkv = torch.randn(2 * 7 * 3 * 5 * 20 + 1)[1:].view(2, 7, 15, 20)
    q = qkv[:, :, 5:10]
    cos, sin = rotary_tables(7, 16)
    assert same_bits(rotary(q, cos, sin), rotary(q.clone(), cos, sin))
    heads_first = torch.randn(2, 5, 7, 20).transpose(1, 2)
    assert same_bits(rotary(heads_first, cos, sin), rotary(heads_first.contiguous(), cos, sin))
    last_strided = torch.randn(2, 7, 20, 5).transpose(2, 3)
    assert same_bits(rotary(last_strided, cos, sin), rotary(last_strided.contiguous(), cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_equals_out_of_place(interleaved: bool) -> None:
    qkv = torch.randn(2, 7, 15, 20)
    cos, sin = rotary_tables(7, 16)
    q, rest = qkv[:, :, 5:10], qkv[:, :, 10:].clone()
    expected = rotary(q, cos, sin, interleaved=interleaved)
    assert rotary(q, cos, sin, interleaved=interleaved, out=q) is q
    assert same_bits(q.contiguous(), expected) and same_bits(qkv[:, :, 10:].contiguous(), rest)
    with pytest.raises(RuntimeError, match="out="):
        rotary(q.clone().requires_grad_(), cos, sin, out=torch.empty_like(expected))


def test_tables_are_rounded_from_float64() -> None:
    cos, sin = rotary_tables(3000, 8, base=500.0)
    angle = torch.arange(3000, dtype=torch.float64)[:, None] * 500.0 ** (-torch.arange(0, 8, 2).double() / 8)
    assert (cos.double() - angle.cos()).abs().max() <= 2.0**-25
    assert (sin.double() - angle.sin()).abs().max() <= 2.0**-25
    assert isinstance(rotary_tables(4, 2, like=np.zeros(1))[0], np.ndarray)


def test_numpy_arrays() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, tables = torch.randn(2, 5, 3, 12), rotary_tables(9, 8)
    arrays = [t.numpy() for t in tables]
    position = np.arange(5, dtype=np.int32) + 2
    y = rotary(x.numpy(), *arrays, position=position)
    assert isinstance(y, np.ndarray) and same_bits(torch.from_numpy(y), rotary(x, *tables, position=2))
    half = rotary(x.numpy().astype(ml_dtypes.bfloat16), *arrays)
    expected = rotary(x.bfloat16(), *tables).view(torch.int16)
    assert same_bits(torch.from_numpy(half.view(np.int16)), expected)


def test_opcheck_and_gradcheck() -> None:
    cos, sin = rotary_tables(5, 6)
    x = torch.randn(2, 3, 2, 8, requires_grad=True)
    call = torch.ops.gptcore.rotary.default
    torch.library.opcheck(call, (x, cos, sin, None, 1, False, False))
    positions = torch.tensor([4, 0, 2], dtype=torch.int32)
    torch.library.opcheck(call, (x, cos, sin, positions, 0, True, False))
    wide = x.detach().double().requires_grad_()
    torch.autograd.gradcheck(lambda x: rotary_reference(x, cos, sin, interleaved=True), (wide,))


def test_compiles_into_one_graph() -> None:
    cos, sin = rotary_tables(7, 10)
    x = torch.randn(2, 7, 3, 12)

    def block(x):
        return ops.rotary(x, cos, sin).square()

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    block(eager).sum().backward()
    torch.compile(block, fullgraph=True)(compiled).sum().backward()
    assert same_bits(eager.grad, compiled.grad)


def _bad(x=None, cos=None, sin=None, **options):
    tables = rotary_tables(6, 8)
    x = torch.randn(2, 5, 3, 8) if x is None else x
    return rotary(x, tables[0] if cos is None else cos, tables[1] if sin is None else sin, **options)


BAD = [
    (lambda: _bad(torch.randn(5, 8)), ValueError, "'x'.*\\(B, T, H, D\\) or \\(T, H, D\\)"),
    (lambda: _bad(torch.randn(2, 5, 3, 8).double()), TypeError, "'x': got float64"),
    (lambda: _bad(torch.randn(2, 5, 3, 7)), ValueError, "'cos': got 4 angles, expected 1 to 3"),
    (lambda: _bad(sin=torch.randn(6, 3)), ValueError, "'sin'.*shape of 'cos'"),
    (lambda: _bad(cos=torch.randn(6, 4).bfloat16()), TypeError, "'cos': got bfloat16"),
    (lambda: _bad(position=2), ValueError, "'position': got 2 for 5 tokens.*table of 6"),
    (lambda: _bad(position=-1), ValueError, "'position': got -1"),
    (lambda: _bad(position=torch.arange(5)), TypeError, "'position': got int64, expected int32"),
    (lambda: _bad(position=torch.arange(4, dtype=torch.int32)), ValueError, "'position'.*\\(5,\\)"),
    (lambda: _bad(position=torch.arange(2, 7, dtype=torch.int32)), ValueError, "'position': got 6"),
    (lambda: rotary_tables(5, 7), ValueError, "'dim': got 7"),
]


@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_is_named(call, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_the_isas_agree_within_rounding() -> None:
    x, tables = torch.randn(1, 9, 2, 66), rotary_tables(9, 66)
    before = backend.isa()
    results = []
    for name in backend.available_isas():
        backend.set_isa(name)
        results.append(torch.stack([rotary(x, *tables, interleaved=i) for i in (False, True)]))
    backend.set_isa(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)
