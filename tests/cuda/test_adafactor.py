"""Adafactor where RMS(U) comes from sums over columns: rows held by a warp, by several, and too wide for that; and its
phases over slices, by numbers in tensors."""

from __future__ import annotations

import math

import pytest
import torch

from gptcore import backend
from gptcore.ops.adafactor_blocks import adafactor_blocks_
from gptcore.ops.grad_norm import grad_norm
from tests.ops.test_adafactor import SETTINGS, State, _check
from tests.ops.test_adafactor_blocks import run
from tests.tolerance import same_bits

# Threads to a row double at 512, 1,024 and 2,048 columns; wider ones than 4,096 are read again. Chunks have up to 512
# rows. Two matrices at once, nothing, and rows that do not begin at multiples of 16 bytes.
WIDTHS = [1, 5, 16, 129, 512, 516, 1030, 2052, 4096, 4100]
SHAPES = [*((5 + 4096 // (8 * n), n) for n in WIDTHS), (520, 4), (2, 37, 60), (0, 4), (7,)]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps_added", [True, False])
def test_rows_of_every_width(isa: str, grad_dtype: torch.dtype, eps_added: bool) -> None:
    """A tight clip, so that a wrong RMS(U) is seen in every element."""
    state = State(SHAPES, grad_dtype, copies=True)
    eps = (1e-30, 1e-3) if eps_added else (1e-7, 1e-3)
    _check(state, eps=eps, eps_added=eps_added, clip_threshold=0.3, grad_scale=4.0, weight_decay=0.1)


@pytest.mark.parametrize("eps", [1e-7, 1e-3, 1.0])
def test_a_second_moment_at_its_floor(isa: str, eps: float) -> None:
    """Where V is held up, sums over columns do not know it: updates are summed by elements there."""
    state = State([(37, 70), (9, 1030), (2, 8, 50)])
    state.grads[2][1, 3:5].zero_()
    for grad in state.grads:
        grad.view(-1)[::7] *= 1e-6
    for clip in (0.3, 1.0):
        _check(state.clone(), eps=(eps, 1e-3), eps_added=False, clip_threshold=clip, beta2=0.0)


def test_no_gradient_and_hardly_any(isa: str) -> None:
    """Rows and columns of zeros, and squares that leave the range of f32, say nothing of RMS(U)."""
    for scale in (0.0, 1e-25, 1e-18):
        state = State([(40, 60), (3, 700)], scale=scale)
        for t in (*state.row_vars, *state.col_vars):
            t.zero_()
        if scale:
            state.grads[0][5:9].zero_(), state.grads[1][:, 90:600].zero_()
            _check(state, clip_threshold=0.5)
        else:
            before = [p.clone() for p in state.params]
            state.step(weight_decay=0.5)
            assert all(same_bits(p, b * 0.5) for p, b in zip(state.params, before, strict=True))


def test_a_norm_told_before_clips_as_one_found(isa: str) -> None:
    """Told, gradients are scaled from the start and RMS(U) follows from columns; found, it is summed by elements."""
    one = State([(70, 300), (5, 2052)], torch.bfloat16)
    two = one.clone()
    norm, _ = one.step(max_norm=0.5, clip_threshold=0.3)
    told = torch.tensor(grad_norm(two.grads)[0], dtype=torch.float64)
    two.step(max_norm=0.5, clip_threshold=0.3, grad_norm=told)
    assert norm == pytest.approx(told.item(), rel=1e-6)
    for a, b in zip(one.written(), two.written(), strict=True):
        # Sums of 64 rows and columns in f32, each way; half of that under the root.
        assert torch.allclose(a, b, rtol=64 * 2.0**-24, atol=1e-6)


def test_the_same_bits_again_and_without_alignment(on_simt: None) -> None:
    assert backend.isa() == "simt"
    shapes = [(90, 516), (300, 40), (6, 2052), (3, 4100)]
    whole, again, shifted = State(shapes, copies=True), None, None
    again, shifted = whole.clone(), whole.clone()
    for name in ("params", "grads", "copies"):
        lists = getattr(shifted, name)
        for i, t in enumerate(lists):
            lists[i] = torch.cat([t.view(-1)[:1], t.view(-1)])[1:].view(t.shape)
    for state in (whole, again, shifted):
        state.step(clip_threshold=0.3)
    for other in (again, shifted):
        assert all(same_bits(a, b) for a, b in zip(whole.written(), other.written(), strict=True))


# --- slices ---------------------------------------------------------------------------------------------------------


def _in_phases(state: State, **options) -> None:
    lists = (state.params, state.grads, state.row_vars, state.col_vars, state.variances)
    wholes = [(tuple(p.shape), 0) for p in state.params]
    run(adafactor_blocks_(*lists, wholes, copies=state.copies, **{**SETTINGS, **options}), lambda sums: sums)


BLOCKED = [(70, 300), (5,), (3, 40, 32), (0, 4), (3, 4100), (2050,)]


@pytest.mark.parametrize("eps_added", [True, False])
def test_phases_of_slices_take_numbers_in_tensors(isa: str, eps_added: bool) -> None:
    plain = State(BLOCKED, torch.bfloat16, copies=True)
    held = plain.clone()
    norm, _ = grad_norm(plain.grads, 4.0)
    options = {"eps": (1e-30, 1e-3) if eps_added else (0.3, 1e-3), "eps_added": eps_added, "max_norm": 0.5}
    _in_phases(plain, grad_norm=norm, grad_scale=4.0, weight_decay=0.2, **options)
    shape = (len(BLOCKED),) if isa == "simt" else ()  # one for each is a device's
    wide = {"dtype": torch.float64}
    numbers = {"step_size": torch.full(shape, 0.02, **wide), "beta2": torch.full(shape, 0.9, **wide)}
    numbers |= {"grad_scale": torch.tensor(4.0), "grad_norm": torch.tensor(norm, **wide)}
    _in_phases(held, weight_decay=0.1, decay_factor=torch.tensor(2.0), **numbers, **options)
    assert all(same_bits(a, b) for a, b in zip(plain.written(), held.written(), strict=True))


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_phases_of_slices_write_nothing_where_the_norm_is_not_finite(isa: str, norm: float) -> None:
    state = State(BLOCKED, copies=True)
    before = [t.clone() for t in state.written()]
    _in_phases(state, grad_norm=torch.tensor(norm, dtype=torch.float64), max_norm=1.0)
    assert all(same_bits(a, b) for a, b in zip(state.written(), before, strict=True))


def test_a_whole_step_and_its_phases_agree(isa: str) -> None:
    """Sums in other orders: by chunks, and by blocks of rows."""
    one = State(BLOCKED, torch.bfloat16)
    two = one.clone()
    norm, _ = grad_norm(one.grads)
    one.step(grad_norm=norm, clip_threshold=0.3)
    _in_phases(two, grad_norm=norm, clip_threshold=0.3)
    for a, b in zip(one.written(), two.written(), strict=True):
        assert torch.allclose(a, b, rtol=128 * 2.0**-24, atol=1e-6)
