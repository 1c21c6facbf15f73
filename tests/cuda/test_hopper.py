"""Hopper's own instructions, against plain products and copies: layouts, boxes, and what forgets to wait."""

from __future__ import annotations

import pytest
import torch

from gptcore import backend
from tests.cuda.emulation import simt_module

pytestmark = pytest.mark.skipif("simt" not in backend.available_isas(), reason="needs a build of tests/simt")

DEPTH = 64
NO_SLIP, OPERAND_OVERWRITTEN, SUMS_WRITTEN, NO_FENCE, NO_WAIT = range(5)


# --- products -----------------------------------------------------------------------------------------------------


def product(a, b, a_layout, b_layout, swizzle, slip=NO_SLIP):
    """(64, DEPTH) times (n, DEPTH) transposed, through shared memory in the given layouts."""
    n = b.shape[0]
    out = torch.full((64, n), float("nan"))
    a, b = (x.T.contiguous() if layout == "mn" else x for x, layout in ((a, a_layout), (b, b_layout)))
    dtype = str(a.dtype).removeprefix("torch.")
    simt_module().warpgroup_product(
        dtype, n, swizzle, a_layout, b_layout, a.data_ptr(), b.data_ptr(), out.data_ptr(), slip
    )
    return out


def operands(n, dtype):
    return torch.randn(64, DEPTH).to(dtype), torch.randn(n, DEPTH).to(dtype)


@pytest.mark.parametrize("b_layout", ["k", "mn"])
@pytest.mark.parametrize("a_layout", ["k", "mn", "registers"])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_a_warpgroup_read_every_layout(dtype, swizzle, a_layout, b_layout):
    a, b = operands(64, dtype)
    torch.testing.assert_close(product(a, b, a_layout, b_layout, swizzle), a.float() @ b.float().T)


@pytest.mark.parametrize("b_layout", ["k", "mn"])
@pytest.mark.parametrize("a_layout", ["k", "registers"])
@pytest.mark.parametrize(("n", "swizzle"), [(32, 64), (96, 64), (128, 128), (192, 128), (256, 128)])
def test_products_of_a_warpgroup_have_every_width(n, swizzle, a_layout, b_layout):
    a, b = operands(n, torch.bfloat16)
    torch.testing.assert_close(product(a, b, a_layout, b_layout, swizzle), a.float() @ b.float().T)


def test_an_operand_overwritten_before_the_wait_shows():
    a, b = operands(64, torch.bfloat16)
    wrong = product(a, b, "k", "k", 128, OPERAND_OVERWRITTEN)
    assert not torch.allclose(wrong, a.float() @ b.float().T)


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        (SUMS_WRITTEN, "written before it was waited for"),
        (NO_FENCE, "without a wgmma_fence"),
        (NO_WAIT, "without having waited"),
    ],
)
def test_products_out_of_order_are_refused(slip, words):
    a, b = operands(64, torch.bfloat16)
    with pytest.raises(RuntimeError, match=words):
        product(a, b, "k", "k", 128, slip)


# --- copies -------------------------------------------------------------------------------------------------------


def through_a_box(x, box, at, swizzle):
    """What a box at ``at`` (both innermost first) of ``x`` brings: the box as it lies in shared memory, and a tensor of
    x's shape, -1 where nothing was stored."""
    seen = torch.empty(tuple(reversed(box)), dtype=x.dtype)
    back = torch.full_like(x, -1)
    simt_module().copy_boxes(
        str(x.dtype).removeprefix("torch."),
        x.data_ptr(),
        back.data_ptr(),
        list(reversed(x.shape)),
        list(reversed(x.stride())),
        box,
        at,
        swizzle,
        seen.data_ptr(),
    )
    return seen, back


def swizzled(rows, swizzle):
    """Rows of ``swizzle`` bytes with their 16-byte chunks where wgmma.cuh says they are."""
    step, chunks = {128: (1, 8), 64: (2, 4), 32: (4, 2)}[swizzle]
    row = torch.arange(rows.shape[0])[:, None]
    place = torch.arange(chunks)[None] ^ (row // step % chunks)
    parts = rows.view(rows.shape[0], chunks, -1)
    out = torch.empty_like(parts)
    out.scatter_(1, place[..., None].expand_as(parts), parts)
    return out.view_as(rows)


CASES = [
    ((40, 64), [64, 16], [0, 8]),  # sizes outermost first; box and place innermost first
    ((40, 72), [64, 16], [64, 32]),  # past both ends
    ((40, 61), [64, 16], [0, -5]),  # before the beginning, and an odd width
    ((3, 40, 64), [64, 16, 2], [0, 30, 2]),
    ((2, 3, 40, 64), [64, 16, 1, 2], [0, -3, 1, 1]),
    ((2, 2, 3, 20, 64), [64, 16, 1, 2, 1], [0, 9, 2, 1, 1]),
]


@pytest.mark.parametrize("swizzle", [0, 128])
@pytest.mark.parametrize(("shape", "box", "at"), CASES)
def test_boxes_fill_with_zeros_outside_the_tensor_and_leave_it_alone(shape, box, at, swizzle):
    whole = torch.arange(torch.tensor([*shape[:-1], 80]).prod().item(), dtype=torch.int32) % 251 + 1
    x = whole.bfloat16().view(*shape[:-1], 80)[..., : shape[-1]]  # rows at multiples of 16 bytes
    back = torch.full((*shape[:-1], 80), -1.0, dtype=x.dtype)[..., : shape[-1]]
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[
        tuple(slice(max(a, 0), max(a + b, 0)) for a, b in zip(reversed(at), reversed(box), strict=True))
    ] = True
    padded = torch.zeros(tuple(reversed(box)), dtype=x.dtype)
    for place in inside.nonzero().tolist():
        padded[tuple(p - a for p, a in zip(place, reversed(at), strict=True))] = x[tuple(place)]
    seen = torch.empty(tuple(reversed(box)), dtype=x.dtype)
    simt_module().copy_boxes(
        "bfloat16",
        x.data_ptr(),
        back.data_ptr(),
        list(reversed(x.shape)),
        list(reversed(x.stride())),
        box,
        at,
        swizzle,
        seen.data_ptr(),
    )
    rows = padded.view(-1, box[0])
    assert torch.equal(seen.view(-1, box[0]), swizzled(rows, swizzle) if swizzle else rows)
    assert torch.equal(back, torch.where(inside, x, torch.full_like(x, -1)))


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzles_are_those_of_the_page(swizzle):
    x = torch.randn(48, swizzle // 2).bfloat16()
    seen, back = through_a_box(x, [swizzle // 2, 48], [0, 0], swizzle)
    assert torch.equal(seen, swizzled(x, swizzle))
    assert torch.equal(back, x)


def test_a_box_ends_where_its_rows_do():
    """A dimension one box long that begins a box before the tensor: behind the rows asked for lie zeros, not others."""
    x = torch.randn(30, 64).bfloat16()
    back = torch.full_like(x, -1)
    seen = torch.empty(16, 64, dtype=x.dtype)
    first, rows, before = 7, 11, 16 * 64 * 2
    simt_module().copy_boxes(
        "bfloat16",
        x.data_ptr() - before,
        back.data_ptr() - before,
        [64, 16, 31],
        [1, 64, 64],
        [64, 16, 1],
        [0, 16 - rows, first + rows],
        0,
        seen.data_ptr(),
    )
    assert torch.equal(seen, torch.cat([x[first : first + rows], torch.zeros(5, 64).bfloat16()]))
    assert torch.equal(back[first : first + rows], x[first : first + rows])
    assert (back[:first] == -1).all() and (back[first + rows :] == -1).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strides": [1, 65]}, "stride"),
        ({"box": [32, 16]}, "row"),
        ({"box": [64, 257]}, "box's size"),
        ({"sizes": [64, 0]}, "a size"),
        ({"data": 2}, "16 bytes"),
    ],
)
def test_tensors_the_engine_cannot_read_are_refused(change, words):
    x = torch.zeros(40, 80).bfloat16()
    data = x.data_ptr() + change.get("data", 0)
    sizes, strides, box = (
        change.get(k, d) for k, d in (("sizes", [64, 40]), ("strides", [1, 80]), ("box", [64, 16]))
    )
    with pytest.raises(RuntimeError, match=words):
        simt_module().copy_boxes("bfloat16", data, data, sizes, strides, box, [0, 0], 128, data)


def test_runs_are_loaded_stored_and_added():
    x = torch.randn(5, 12)
    to, total = torch.empty_like(x), torch.ones(12)
    simt_module().bulk_runs(x.data_ptr(), to.data_ptr(), total.data_ptr(), 5, 48)
    assert torch.equal(to, x)
    expected = torch.ones(12)
    for row in x:
        expected += row
    assert torch.equal(total, expected)
