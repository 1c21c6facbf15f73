"""adafactor_blocks_: against the reference in float64, and the same bits for every cut into slices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.ops.adafactor_blocks import FLAT_BLOCK, adafactor_blocks_, blocks_before, row_block
from gptcore.ops.grad_norm import grad_norm
from tests.ops.test_adafactor import SETTINGS, SHAPES, State, _check
from tests.tolerance import assert_same_for_threads, same_bits

Combine = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def run(phases, combine: Combine) -> None:
    """All phases of one call, each answered by what ``combine`` makes of it."""
    with suppress(StopIteration):
        sums = next(phases)
        while True:
            sums = phases.send(combine(sums))


def in_blocks(params, grads, row_vars, col_vars, variances, **options) -> tuple[float, bool]:
    """The whole step by one owner, in the form of ``adafactor_``."""
    norm, found_inf = grad_norm(grads, options.get("grad_scale", 1.0))
    if not found_inf:
        wholes = [(tuple(p.shape), 0) for p in params]
        lists = (params, grads, row_vars, col_vars, variances, wholes)
        run(adafactor_blocks_(*lists, **{"grad_norm": norm, **options}), lambda sums: sums)
    return norm, found_inf


class Blocked(State):
    """A state whose step goes by blocks, for the checks that ``adafactor_`` passes."""

    def step(self, function=in_blocks, **options):
        return super().step(function, **options)

    def clone_blocked(self) -> Blocked:
        other, twin = Blocked([]), self.clone()
        for name in State.LISTS:
            setattr(other, name, getattr(twin, name))
        return other


# Beside those of adafactor_: matrices of several blocks of rows and of several chunks within one, and a batch of them.
MORE = [(3000, 64), (5, 200, 32), (2, 4100, 16), (40, 4097)]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factored", [True, False])
def test_matches_float64_at_every_shape_on_every_isa(isa: str, grad_dtype, factored: bool) -> None:
    shapes = SHAPES + MORE
    decays = [0.1 * (i % 3) for i in range(len(shapes))]
    state = Blocked(shapes, grad_dtype, factored=factored, momentum=not factored, copies=True)
    _check(state, weight_decay=decays, max_norm=0.5, grad_scale=4.0, beta1=0.9)


shapes = st.one_of(
    st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple),
    st.tuples(st.integers(1, 300), st.integers(1, 80)),
)


@settings(max_examples=40, deadline=None)
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
    _check(Blocked(shapes, grad_dtype, scale=grad_scale, **made), grad_scale=grad_scale, **options)


@pytest.mark.parametrize("eps", [1e-7, 1e-3, 1.0])
def test_updates_summed_from_statistics_or_one_by_one(eps: float) -> None:
    """The second exchange has sums where torch's floor holds V up or columns are many, and zeros elsewhere."""
    state = Blocked([(300, 70), (64, 5000), (3, 40, 50)])
    state.grads[2][1, 7:9].zero_()
    for grad in state.grads:
        grad.view(-1)[::7] *= 1e-6
    for clip in (0.3, 1.0):
        _check(state.clone_blocked(), eps=(eps, 1e-3), eps_added=False, clip_threshold=clip, beta2=0.0)


# --- cuts ----------------------------------------------------------------------------------------------------------

CUT_SHAPES = [(3000, 64), (5, 128, 32), (70, 4099), (5000,), (77,), (0, 4)]


def borders(shape: Sequence[int], factored: bool) -> list[int]:
    """Where a slice may begin."""
    size = math.prod(shape)
    if not factored or not size:
        return [*range(0, size, FLAT_BLOCK), size]
    rows, cols = shape[-2:]
    block = row_block(shape)
    return [
        e * rows * cols + r * cols for e in range(size // (rows * cols)) for r in range(0, rows, block)
    ] + [size]


def slices_of(state: State, i: int, ends: Sequence[int], factored: bool) -> list[dict]:
    """The tensors of each slice of parameter i; copies of the whole's."""
    out = []
    for start, stop in itertools.pairwise(ends):
        own = {"wholes": (tuple(state.params[i].shape), start)}
        for name in State.LISTS:
            t = None if getattr(state, name) is None else getattr(state, name)[i]
            if t is not None and name == "row_vars":
                cols = state.params[i].shape[-1]
                t = t.reshape(-1)[start // cols : stop // cols] if cols else t
            elif t is not None and name != "col_vars":
                t = t.reshape(-1)[start:stop]
            own[name] = None if t is None else t.clone()
        out.append(own)
    return out


def step_cut(
    state: State, cuts: list[Sequence[int]], owners: int, factored: bool, **options
) -> list[list[dict]]:
    """All owners' steps, side by side: slice s of a parameter belongs to owner s mod owners."""
    pieces = [slices_of(state, i, ends, factored) for i, ends in enumerate(cuts)]
    norm, _ = grad_norm(state.grads, options.get("grad_scale", 1.0))
    held: list[list[tuple[int, int]]] = [
        [(i, s) for i, p in enumerate(pieces) for s in range(len(p)) if (i + s) % owners == o]
        for o in range(owners)
    ]
    running = []
    for own in held:
        lists = {name: [pieces[i][s][name] for i, s in own] for name in (*State.LISTS, "wholes")}
        for name in ("exp_avgs", "copies"):
            lists[name] = None if getattr(state, name) is None else lists[name]
        running.append(adafactor_blocks_(**lists, grad_norm=norm, **{**SETTINGS, **options}))
    sums = [next(phases) for phases in running]
    for last in (False, True):
        known = {key: t for own, ts in zip(held, sums, strict=True) for key, t in zip(own, ts, strict=True)}
        joined = [torch.cat([known[i, s] for s in range(len(p))]) for i, p in enumerate(pieces)]
        for o, phases in enumerate(running):
            if last:
                with suppress(StopIteration):
                    phases.send([joined[i] for i, _ in held[o]])
            else:
                sums[o] = phases.send([joined[i] for i, _ in held[o]])
    return pieces


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {"max_norm": 1.0, "weight_decay": 0.1},
    {"eps": (1e-3, 1e-3), "eps_added": False, "clip_threshold": 0.5, "maximize": True},
    {"beta1": 0.9, "scaled_decay": True, "weight_decay": 0.1, "grad_scale": 8.0},
])  # fmt: skip
@pytest.mark.parametrize("factored", [True, False])
def test_every_cut_has_the_same_bits(isa: str, grad_dtype, options: dict, factored: bool) -> None:
    start = State(CUT_SHAPES, grad_dtype, factored=factored, momentum="beta1" in options, copies=True)
    whole = start.clone()
    whole.step(in_blocks, **options)
    generator = torch.Generator().manual_seed(5)
    for owners in (1, 2, 5):
        cuts = []
        for shape in CUT_SHAPES:
            inner = borders(shape, factored and len(shape) > 1)[1:-1]
            kept = torch.rand(len(inner), generator=generator) < owners / 5  # and with 5 at every border
            cuts.append([0, *(b for b, k in zip(inner, kept, strict=True) if k), math.prod(shape)])
        pieces = step_cut(start, cuts, owners, factored, **options)
        for i, slices in enumerate(pieces):
            for name in State.LISTS:
                expected = getattr(whole, name) and getattr(whole, name)[i]
                if expected is None or name == "grads":
                    continue
                if name == "col_vars":
                    assert all(same_bits(s[name], expected) for s in slices)
                    continue
                got = torch.cat([s[name].reshape(-1) for s in slices])
                assert same_bits(got, expected.reshape(-1)), (name, CUT_SHAPES[i], owners)


def test_same_bits_for_every_thread_count_and_run(threads: None) -> None:
    start = Blocked(
        [(3000, 64), (3,), (17, 9), (100_000,), (2, 150, 33)], torch.bfloat16, copies=True, momentum=True
    )

    def step() -> list[torch.Tensor]:
        state = start.clone_blocked()
        state.step(max_norm=0.1, weight_decay=0.1, beta1=0.9)
        return state.written()

    assert_same_for_threads(step)


@pytest.mark.parametrize(
    "shape", [(7,), (1, 1), (3000, 64), (5, 200, 32), (50257, 768), (0, 4), (3, 0), (2, 7, 3)]
)
@pytest.mark.parametrize("factored", [True, False])
def test_blocks_are_counted_by_their_borders(shape: tuple[int, ...], factored: bool) -> None:
    if len(shape) < 2 and factored:
        pytest.skip("vectors are not factored")
    starts = borders(shape, factored)
    counts = [blocks_before(shape, at, factored) for at in starts]
    assert counts == (list(range(len(starts))) if math.prod(shape) else [0] * len(starts))


def test_numpy_arrays_and_parameters() -> None:
    state = State([(33, 4), (5,)])
    other = state.clone()
    state.params = [torch.nn.Parameter(p) for p in state.params]
    state.step(in_blocks)
    names = ("params", "grads", "row_vars", "col_vars", "variances")
    arrays = [[None if t is None else t.numpy() for t in getattr(other, name)] for name in names]
    wholes = [(p.shape, 0) for p in other.params]
    phases = adafactor_blocks_(*arrays, wholes, grad_norm=grad_norm(other.grads)[0], **SETTINGS)
    run(phases, lambda sums: [np.ascontiguousarray(s) for s in sums])
    for a, b in zip(state.params, other.params, strict=True):
        assert same_bits(a.detach(), b)


# --- errors --------------------------------------------------------------------------------------------------------

BAD = [
    (
        {"params": [torch.zeros(64, 256).double(), torch.zeros(5)]},
        TypeError,
        "adafactor_blocks_.*'params\\[0\\]'",
    ),
    ({"grads": [torch.zeros(64, 256)]}, ValueError, "'grads': got 1 entries, expected 2"),
    (
        {"row_vars": [torch.ones(63), None]},
        ValueError,
        "'row_vars\\[0\\]': got float32 \\(63,\\).*64 elements",
    ),
    ({"col_vars": [torch.ones(1, 255), None]}, ValueError, "'col_vars\\[0\\]'.*256 elements"),
    ({"col_vars": [None, None]}, TypeError, "'col_vars\\[0\\]': got None"),
    ({"variances": [None, torch.ones(6)]}, ValueError, "'variances\\[1\\]': got shape \\(6,\\)"),
    ({"variances": [None, None]}, ValueError, "row_block: argument 'shape': got \\(5,\\)"),
    (
        {"wholes": [((64, 256), 256), ((5,), 0)]},
        ValueError,
        "'slices\\[0\\]': got \\[256, .*within its whole",
    ),
    ({"wholes": [((128, 256), 256), ((5,), 0)]}, ValueError, "'slices\\[0\\]'.*between blocks of rows"),
    ({"wholes": [((128, 128), 64), ((5,), 0)]}, ValueError, "'slices\\[0\\]'.*within its whole"),
    ({"wholes": [((64, 256), 0), ((6,), 0)]}, ValueError, "'slices\\[1\\]'.*multiples of 1024"),
    ({"grad_norm": None}, ValueError, "'grad_norm': got None"),
    ({"grad_norm": math.nan}, ValueError, "'grad_norm'"),
    ({"beta2": 1.0}, ValueError, "'beta2'.*\\[0, 1\\)"),
]


def call(**changes):
    state = State([(64, 256), (5,)], copies=True)
    lists = {name: getattr(state, name) for name in State.LISTS}
    options = {**SETTINGS, **lists, "wholes": [((64, 256), 0), ((5,), 0)], "grad_norm": 1.0, **changes}
    return state, adafactor_blocks_(**options)


@pytest.mark.parametrize("changes, error, text", BAD)
def test_bad_input_is_named_and_nothing_written(changes, error, text: str) -> None:
    state, phases = call(**changes)
    before = [t.clone() for t in state.written()]
    with pytest.raises(error, match=text):
        next(phases)
    assert all(same_bits(a, b) for a, b in zip(state.written(), before, strict=True))


def test_sums_of_too_few_blocks_are_refused() -> None:
    _, phases = call()
    sums = next(phases)
    with pytest.raises(ValueError, match="'statistics\\[0\\]': got shape \\(15, 515\\).*\\(16, 515\\)"):
        phases.send([sums[0][1:], sums[1]])
    _, phases = call()
    updates = phases.send(next(phases))
    with pytest.raises(TypeError, match="'sums\\[1\\]': got float32, expected float64"):
        phases.send([updates[0], updates[1].float()])
