from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.ops.adafactor import adafactor_, adafactor_reference
from tests.tolerance import ROUNDOFF, assert_same_for_threads, same_bits

SETTINGS = {"step_size": 0.02, "beta2": 0.9}
# Vectors of every length to twice the widest register and matrices around tiles of 4 rows, chunks of 128 rows and
# of 4,096 columns, three dimensions, and nothing at all.
SHAPES = [
    *((n,) for n in range(34)), (), (65536,), (65537,), (100_000,),
    (1, 1), (1, 40), (40, 1), (3, 5), (4, 16), (5, 17), (127, 33), (128, 16), (129, 31), (300, 1030), (7, 4099),
    (3, 5, 7), (2, 3, 130, 20), (0, 4), (4, 0), (2, 0, 3),
]  # fmt: skip


class State:
    """Parameters, gradients and second moments of the given shapes, after some imagined steps."""

    def __init__(
        self, shapes, grad_dtype=torch.float32, *, scale=1.0, factored=True, momentum=False, copies=False
    ):
        self.params = [torch.randn(s) for s in shapes]
        self.grads = [(torch.randn(s) * scale).to(grad_dtype) for s in shapes]
        matrix = [factored and len(s) > 1 for s in shapes]
        rows = [(torch.rand(*s[:-1], 1) + 0.1) if m else None for s, m in zip(shapes, matrix, strict=True)]
        cols = [
            (torch.rand(*s[:-2], 1, s[-1]) + 0.1) if m else None for s, m in zip(shapes, matrix, strict=True)
        ]
        self.row_vars, self.col_vars = rows, cols
        self.variances = [None if m else torch.rand(s) for s, m in zip(shapes, matrix, strict=True)]
        self.exp_avgs = [torch.randn(s) * 0.01 for s in shapes] if momentum else None
        self.copies = [torch.zeros(s, dtype=torch.bfloat16) for s in shapes] if copies else None

    LISTS = ("params", "grads", "row_vars", "col_vars", "variances", "exp_avgs", "copies")

    def clone(self, dtype: torch.dtype = torch.float32) -> State:
        other = State([])
        for name in self.LISTS:
            mine = getattr(self, name)
            kept = name in ("grads", "copies") and dtype != torch.float64
            cloned = [
                None if t is None else t.clone() if kept else t.to(dtype, copy=True) for t in mine or []
            ]
            setattr(other, name, None if mine is None else cloned)
        return other

    def step(self, function=adafactor_, **options):
        return function(
            self.params, self.grads, self.row_vars, self.col_vars, self.variances,
            exp_avgs=self.exp_avgs, copies=self.copies, **{**SETTINGS, **options},
        )  # fmt: skip

    def written(self) -> list[torch.Tensor]:
        names = [name for name in self.LISTS if name != "grads"]
        return [t for name in names for t in getattr(self, name) or [] if t is not None]


def _check(state: State, **options) -> None:
    exact, twin = state.clone(torch.float64), state.clone()
    norm, found = state.step(**options)
    exact_norm, _ = exact.step(adafactor_reference, **options)
    twin.step(adafactor_reference, **options)
    assert not found
    # f32 sums over 64 vectors or 128 rows: 128 roundings of half a unit at worst.
    assert abs(norm - exact_norm) <= 16 * ROUNDOFF[torch.float32] * exact_norm
    for name in ("params", "row_vars", "col_vars", "variances", "exp_avgs"):
        for got, want, torchs in zip(*(getattr(s, name) or [] for s in (state, exact, twin)), strict=True):
            if got is None or not got.numel():
                continue
            # The means of squares carry sqrt(128) roundings of f32, the rest a handful; torch makes as many.
            floor = (4 + 128**0.5) * ROUNDOFF[torch.float32]
            # (Where R C leaves the range of f32, torch's twin is NaN and no yardstick.)
            theirs = (torchs.double() - want).abs().nan_to_num(0.0, 0.0).max()
            bound = 2 * theirs + floor * want.abs().max()
            assert (got.double() - want).abs().max() <= bound, (name, tuple(got.shape))
    if state.copies is not None:
        for copy, p in zip(state.copies, state.params, strict=True):
            assert same_bits(copy, p.bfloat16())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factored", [True, False])
def test_matches_float64_at_every_shape_on_every_isa(isa: str, grad_dtype, factored: bool) -> None:
    decays = [0.1 * (i % 3) for i in range(len(SHAPES))]
    state = State(SHAPES, grad_dtype, factored=factored, momentum=not factored, copies=True)
    _check(state, weight_decay=decays, max_norm=0.5, grad_scale=4.0, beta1=0.9)


shapes = st.one_of(
    st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple),
    st.tuples(st.integers(1, 300), st.integers(1, 80)),
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(shapes, max_size=5),
    grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    made=st.fixed_dictionaries(
        {"factored": st.booleans(), "momentum": st.booleans(), "copies": st.booleans()}
    ),
    options=st.fixed_dictionaries(
        {
            "eps": st.sampled_from([(1e-30, 1e-3), (1e-3, 10.0)]),
            "eps_added": st.booleans(),
            "clip_threshold": st.sampled_from([None, 0.1, 1.0, 1e3]),
            "scale_parameter": st.booleans(),
            "scaled_decay": st.booleans(),
            "maximize": st.booleans(),
            "max_norm": st.sampled_from([None, 1e-2, 1e6]),
            "beta1": st.sampled_from([0.0, 0.9]),
            "beta2": st.sampled_from([0.0, 0.5]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
    grad_scale=st.sampled_from([1.0, 1024.0]),
    seed=st.integers(0, 2**16),
)
def test_any_lists_and_options(shapes, grad_dtype, made, options, grad_scale, seed) -> None:
    torch.manual_seed(seed)
    _check(State(shapes, grad_dtype, scale=grad_scale, **made), grad_scale=grad_scale, **options)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10])
def test_small_and_large_gradients(scale: float) -> None:
    """eps takes over where gradients vanish: torch's floor holds V at eps^2, the paper's sum at eps."""
    for options in ({"eps": (1e-7, 1e-3), "eps_added": False}, {"eps": (1e-30, 1e-3)}):
        state = State([(65, 33), (50,)], scale=scale)
        for t in [*state.row_vars, *state.col_vars, *state.variances]:
            if t is not None:
                t.zero_()
        _check(state, **options)


def test_zero_gradients_only_decay() -> None:
    state = State([(20, 30), (50,)])
    before = [p.clone() for p in state.params]
    for g in state.grads:
        g.zero_()
    norm, _ = state.step(weight_decay=0.5)
    assert norm == 0.0
    for p, b in zip(state.params, before, strict=True):
        assert same_bits(p, b * 0.5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_where_a_gradient_is_not_finite(isa: str, bad: float, grad_dtype) -> None:
    for position in (0, 16, 65, 5000, 8999):
        state = State([(5,), (90, 100)], grad_dtype, copies=True, momentum=True)
        state.grads[1].view(-1)[position] = bad
        before = [t.clone() for t in state.written()]
        norm, found = state.step(max_norm=1.0)
        assert found is True and not math.isfinite(norm)
        assert all(same_bits(a, b) for a, b in zip(state.written(), before, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25, 1e30])
def test_norm_survives_squares_beyond_f32(scale: float) -> None:
    state = State([(100,), (300, 100)], scale=scale)
    state.grads[1][7:50].zero_()
    exact = math.sqrt(sum(g.double().square().sum().item() for g in state.grads))
    norm, found = state.step(max_norm=1.0)
    assert not found
    assert norm == pytest.approx(exact, rel=1e-6)
    if scale < 1:  # beyond 1e19 the factors are infinite, as torch's are
        assert all(t.isfinite().all() for t in state.params)


@pytest.mark.parametrize("eps", [1e-7, 1e-3, 1.0])
def test_updates_summed_from_factors_or_one_by_one(eps: float) -> None:
    """The clip's RMS comes from the factors where torch's floor holds nothing back, else from every element."""
    state = State([(300, 70), (64, 5000), (3, 40, 50)])
    state.grads[2][1, 7:9].zero_()
    for grad in state.grads:
        grad.view(-1)[::7] *= 1e-6
    for clip in (0.3, 1.0):
        _check(state.clone(), eps=(eps, 1e-3), eps_added=False, clip_threshold=clip, beta2=0.0)


def test_a_norm_that_is_known_takes_the_place_of_ours() -> None:
    one = State([(20, 30), (5,)])
    two = one.clone()
    norm, _ = one.step(max_norm=1.0)
    assert two.step(max_norm=1.0, grad_norm=norm) == (norm, False)
    assert all(same_bits(a, b) for a, b in zip(one.written(), two.written(), strict=True))


def test_same_bits_for_every_thread_count_and_run(threads: None) -> None:
    start = State(
        [(700, 768), (3,), (17, 9), (100_000,), (2, 150, 33)], torch.bfloat16, copies=True, momentum=True
    )

    def step() -> list[torch.Tensor]:
        state = start.clone()
        norm, _ = state.step(max_norm=0.1, weight_decay=0.1, beta1=0.9)
        return [*state.written(), torch.tensor(norm, dtype=torch.float64)]

    assert_same_for_threads(step)


def test_misaligned_tensors() -> None:
    state = State([(3, 20)], torch.bfloat16, copies=True, momentum=True)
    for name in State.LISTS:
        lists = getattr(state, name)
        for i, t in enumerate(lists):
            if t is not None:
                lists[i] = torch.cat([t.view(-1)[:1], t.view(-1)])[1:].view(t.shape)
    _check(state, max_norm=1.0, beta1=0.9)


def test_parameters_that_require_grad_and_numpy_arrays() -> None:
    state = State([(33, 4), (5,)])
    other = state.clone()
    state.params = [torch.nn.Parameter(p) for p in state.params]
    names = ("params", "grads", "row_vars", "col_vars", "variances")
    arrays = [[None if t is None else t.numpy() for t in getattr(other, name)] for name in names]
    state.step(max_norm=1.0)
    adafactor_(*arrays, max_norm=1.0, **SETTINGS)
    for a, b in zip(state.params, arrays[0], strict=True):
        assert isinstance(b, np.ndarray) and same_bits(a.detach(), torch.from_numpy(b))


def _call(**changes):
    state = State([(4, 6), (5,)], copies=True)
    for name in State.LISTS:
        if name in changes:
            setattr(state, name, changes.pop(name))
    before = [t.clone() for t in state.written()]
    try:
        state.step(**changes)
    finally:
        assert all(same_bits(a, b) for a, b in zip(state.written(), before, strict=True))


ROW, COL, FLAT = torch.ones(4, 1), torch.ones(1, 6), torch.ones(5)
BAD = [
    ({"params": [torch.zeros(4, 6), torch.zeros(5).double()]}, TypeError, "'params\\[1\\]': got float64"),
    ({"grads": [torch.zeros(4, 6)]}, ValueError, "'grads': got 1 entries, expected 2"),
    ({"grads": [torch.zeros(4, 6), torch.zeros(10)[::2]]}, ValueError, "'grads\\[1\\]'.*contiguous"),
    ({"row_vars": [torch.ones(4), None]}, ValueError, "'row_vars\\[0\\]': got shape \\(4,\\)"),
    ({"col_vars": [torch.ones(1, 5), None]}, ValueError, "'col_vars\\[0\\]': got shape \\(1, 5\\)"),
    ({"col_vars": [None, None]}, (ValueError, TypeError), "'col_vars\\[0\\]'"),
    ({"col_vars": [COL.bfloat16(), None]}, TypeError, "'col_vars\\[0\\]'"),
    ({"variances": [None, None]}, ValueError, "'variances\\[1\\]': got None.*fewer|less"),
    ({"variances": [None, torch.ones(6)]}, ValueError, "'variances\\[1\\]': got shape \\(6,\\)"),
    ({"exp_avgs": [torch.zeros(4, 6)]}, ValueError, "'exp_avgs': got 1 entries"),
    ({"copies": [torch.zeros(4, 6), torch.zeros(5)]}, TypeError, "'copies\\[0\\]': got float32"),
    ({"weight_decay": [0.1]}, ValueError, "'weight_decay': got 1 entries"),
    ({"weight_decay": -0.1}, ValueError, "'weight_decay\\[0\\]'"),
    ({"step_size": math.nan}, ValueError, "'step_size'"),
    ({"beta2": 1.0}, ValueError, "'beta2'.*\\[0, 1\\)"),
    ({"beta1": -0.1}, ValueError, "'beta1'.*\\[0, 1\\)"),
    ({"eps": (-1.0, 0.0)}, ValueError, "'eps\\[0\\]'"),
    ({"clip_threshold": 0.0}, ValueError, "'clip_threshold'.*above 0"),
    ({"max_norm": 0.0}, ValueError, "'max_norm'.*above 0"),
    ({"grad_scale": 0.0}, ValueError, "'grad_scale'"),
    ({"grad_norm": math.inf}, ValueError, "'grad_norm'"),
]


@pytest.mark.parametrize("changes, error, text", BAD)
def test_bad_input_is_named_and_nothing_written(changes, error, text: str) -> None:
    with pytest.raises(error, match=text):
        _call(**dict(changes))
