"""Large f32 groups, which torch multiplies where MKL was told to keep its bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gptcore import backend
from gptcore.ops.grouped_linear import grouped_linear, grouped_linear_backward
from tests.ops.test_grouped_linear import _check, _inputs, _offsets
from tests.tolerance import same_bits

# On either side of the limits for y and dweight (512 rows) and dx (64), an empty group, and rows of none.
SIZES, REST = (512, 63, 0, 700, 511, 64), 3


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that imported gptcore before torch, which this one did not."""
    monkeypatch.setattr(backend, "mkl_is_strict", lambda: True)


def test_matches_float64(strict: None) -> None:
    for inner, outer in [(64, 97), (150, 64)]:
        x, weight, offsets, bias, dy = _inputs(SIZES, inner, outer, torch.float32, rest=REST)
        _check(x, weight, offsets, bias, dy)
        _check(x, weight, offsets, None, dy, torch.randn(weight.shape))
        wide = torch.randn(len(x), inner + 5)[:, :inner].copy_(x)
        _check(wide, weight, offsets, bias, dy)


def test_who_multiplies_which_group(strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, offsets, _, dy = _inputs(SIZES, 470, 480, torch.float32, rest=REST, bias=False)
    mm, rows_of_library = torch.mm, []

    def noted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        rows_of_library.append(a.shape[0] if a.shape[0] != 480 else a.shape[1])
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    y, own = (grouped_linear(x, weight, offsets, batch_invariant=choice) for choice in (False, True))
    got, kept = (
        grouped_linear_backward(dy, x, weight, offsets, batch_invariant=choice) for choice in (False, True)
    )
    monkeypatch.undo()
    assert rows_of_library == [512, 700, *(512, 700, 511, 64), 512, 700]  # for y, dx and dweight
    for e, size in enumerate(SIZES):
        rows = slice(*offsets.tolist()[e : e + 2])
        large, dx_large = size >= 512, size >= 64
        assert same_bits(y[rows], torch.mm(x[rows], weight[e].t()) if large else own[rows])
        assert same_bits(got[0][rows], torch.mm(dy[rows], weight[e]) if dx_large else kept[0][rows])
        assert same_bits(got[1][e], torch.mm(dy[rows].t(), x[rows]) if large else kept[1][e])
    assert (y[-REST:] == 0).all() and (got[0][-REST:] == 0).all()


def _bits(*inputs: torch.Tensor, **options: bool) -> list[torch.Tensor]:
    x, weight, offsets, _, dy = inputs
    gradients = grouped_linear_backward(dy, x, weight, offsets, **options)
    return [grouped_linear(x, weight, offsets, **options), *gradients[:2]]


def test_what_stays_ours(strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", None)
    for inner, outer, dtype, precision in [
        (63, 80, torch.float32, "ieee"), (80, 63, torch.float32, "ieee"), (80, 80, torch.bfloat16, "ieee"),
        (80, 80, torch.float32, "bf16"),
    ]:  # fmt: skip
        inputs = _inputs((600,), inner, outer, dtype, bias=False)
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = precision
        try:
            got = _bits(*inputs)
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before
        assert all(map(same_bits, got, _bits(*inputs, batch_invariant=True)))
    monkeypatch.setattr(backend, "mkl_is_strict", lambda: False)
    inputs = _inputs((600,), 80, 80, torch.float32, bias=False)
    assert all(map(same_bits, _bits(*inputs), _bits(*inputs, batch_invariant=True)))


def test_autograd_compile_and_parameters(strict: None) -> None:
    x, weight, offsets, bias, dy = _inputs((600, 70), 480, 490, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    grouped_linear(leaves[0], leaves[1], offsets, bias=leaves[2]).backward(dy)
    explicit = grouped_linear_backward(dy, *leaves[:2], offsets, bias=leaves[2])
    assert all(same_bits(leaf.grad, g) for leaf, g in zip(leaves, explicit, strict=True))
    # A leaf as out is written, too. 600 additions round sums of about sqrt(600), and the roundings walk, on both sides.
    total = torch.ones(2, 490, 480).requires_grad_()
    grouped_linear_backward(dy, *leaves[:2], offsets, out=total, accumulate=True, need_dx=False)
    exact = 1 + explicit[1].double()
    assert (
        (total - exact).abs() <= torch.finfo(torch.float32).eps * (600**0.5 + exact.abs()) * 600**0.5
    ).all()
    numpy = offsets.numpy()  # whoever made them: then no group is the library's
    assert same_bits(
        grouped_linear(x, weight, numpy), grouped_linear(x, weight, offsets, batch_invariant=True)
    )
    invariant = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = torch.compile(grouped_linear, fullgraph=True)(
        invariant[0], invariant[1], offsets, bias=invariant[2], batch_invariant=True
    )
    y.backward(dy)
    kept = grouped_linear_backward(dy, x, weight, offsets, bias=bias, batch_invariant=True)
    assert all(same_bits(leaf.grad, g) for leaf, g in zip(invariant, kept, strict=True))


def test_a_bad_call_writes_nothing(strict: None) -> None:
    out = torch.full((600, 80), 7.0)
    with pytest.raises(ValueError, match="at most M = 600"):
        grouped_linear(torch.randn(600, 80), torch.randn(2, 80, 80), _offsets(590, 20), out=out)
    assert (out == 7).all()


BITS = """
import gptcore, torch
from gptcore import backend
from gptcore.ops.grouped_linear import grouped_linear, grouped_linear_backward

assert backend.mkl_is_strict()
def run(x, weight, dy, bias, ends, threads):
    torch.set_num_threads(threads)
    backend.set_num_threads(threads)
    offsets = torch.tensor(ends, dtype=torch.int32)
    gradients = grouped_linear_backward(dy, x, weight, offsets, bias=bias)
    return [grouped_linear(x, weight, offsets, bias=bias), grouped_linear(x, weight, offsets), *gradients]

for inner, outer in [(64, 65), (200, 333), (768, 96), (96, 1536)]:
    x, weight, bias = torch.randn(1300, inner), torch.randn(2, outer, inner), torch.randn(2, outer)
    dy, ends = torch.randn(1300, outer), [0, 700, 1300]
    whole = run(x, weight, dy, bias, ends, 1)
    for threads in (2, 3, 4, 2):
        for i, (got, wanted) in enumerate(zip(run(x, weight, dy, bias, ends, threads), whole)):
            assert torch.equal(got, wanted), (inner, outer, threads, i)
    for begin, end in [(0, 512), (13, 700), (100, 677), (1, 600)]:
        one = run(x[begin:end], weight[:1], dy[begin:end], bias[:1], [0, end - begin], 2)
        for i in (0, 1, 2):
            assert torch.equal(one[i], whole[i][begin:end]), (inner, outer, begin, end, i)
    for begin, end in [(0, 64), (600, 699)]:
        one = run(x[begin:end], weight[:1], dy[begin:end], bias[:1], [0, end - begin], 2)
        assert torch.equal(one[2], whole[2][begin:end]), (inner, outer, begin, end, "dx")
print("same")
"""


def _python(code: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**kept, **environment}
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL here")
@pytest.mark.parametrize("setting", [{}, {"MKL_CBWR": "AVX2,STRICT"}], ids=["as-set", "avx2"])
def test_bits_depend_neither_on_threads_nor_on_other_rows(setting: dict[str, str]) -> None:
    assert _python(BITS, **setting) == "same"


def test_mkl_is_not_trusted_unless_it_was_asked_in_time() -> None:
    question = "from gptcore import backend; print(backend.mkl_is_strict())"
    assert _python(f"import torch, gptcore; {question}") == "False"
    assert _python(f"import gptcore, torch; {question}", MKL_CBWR="AUTO") == "False"
    assert _python(f"import gptcore, torch; {question}") == str(torch.backends.mkl.is_available())
