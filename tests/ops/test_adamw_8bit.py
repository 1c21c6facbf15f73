from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.ops.adamw_8bit import (
    BLOCK,
    adamw_8bit_,
    adamw_8bit_reference,
    dequantise_reference,
    dynamic_map,
    quantise_reference,
    random_bits_reference,
)
from tests.tolerance import ROUNDOFF, assert_same_for_threads, same_bits

SETTINGS = {"lr": 0.02, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
# Every size to twice the widest register, around a block, and beyond a chunk of 16384.
SIZES = [*range(34), 127, 255, 256, 257, 511, 1000, 16383, 16385, 40000]
LISTS = ("params", "grads", "exp_avgs", "exp_avg_scales", "exp_avg_sqs", "exp_avg_sq_scales")
F32 = ROUNDOFF[torch.float32]


class State:
    """Parameters, gradients and quantised moments of the given sizes, after some imagined steps."""

    def __init__(self, sizes, grad_dtype=torch.float32, *, low=False, copies=False, scale=1.0) -> None:
        self.params = [torch.randn(n).to(torch.bfloat16 if low else torch.float32) for n in sizes]
        self.grads = [(torch.randn(n) * scale).to(grad_dtype) for n in sizes]
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            codes = [torch.zeros(n, dtype=torch.uint8) for n in sizes]
            scales = [torch.zeros(-(-n // BLOCK)) for n in sizes]
            for c, s in zip(codes, scales, strict=True):
                # A wide range, so that codes of all decades occur.
                x = torch.randn(c.shape) * 10.0 ** (-6 * torch.rand(c.shape)) * scale
                quantise_reference(x if signed else x * x, c, s, signed)
            setattr(self, name + "s", codes)
            setattr(self, name + "_scales", scales)
        self.copies = [torch.zeros(n, dtype=torch.bfloat16) for n in sizes] if copies else None

    def clone(self, dtype: torch.dtype = torch.float32) -> State:
        other = State([])
        for name in LISTS:
            wide = dtype == torch.float64 and name not in ("exp_avgs", "exp_avg_sqs")
            setattr(other, name, [t.to(dtype) if wide else t.clone() for t in getattr(self, name)])
        other.copies = None if self.copies is None else [c.clone() for c in self.copies]
        return other

    def step(self, function=adamw_8bit_, **options):
        lists = [getattr(self, name) for name in LISTS]
        return function(*lists, copies=self.copies, **{**SETTINGS, "step": 3, **options})

    def written(self) -> list[torch.Tensor]:
        return [t for name in LISTS if name != "grads" for t in getattr(self, name)] + (self.copies or [])


def _check_codes(got, got_scales, want, want_scales, signed: bool) -> None:
    """Scales to rounding; codes equal but for values half way between two, where rounding decides."""
    # 16 roundings in the norm, twice in v, and a handful of its own.
    assert (got_scales.double() - want_scales).abs().max() <= 40 * F32 * want_scales.max()
    difference = (got.int() - want.int()).abs()
    assert difference.max() <= 1
    assert difference.sum() <= max(1, 2e-3 * got.numel())
    values = torch.tensor(dynamic_map(signed), dtype=torch.float64)
    gap = (values[1:] - values[:-1]).max() * want_scales.max()
    error = dequantise_reference(got, got_scales, signed).double() - dequantise_reference(
        want, want_scales, signed
    )
    assert error.abs().max() <= gap


def _check(state: State, **options) -> None:
    exact, twin = state.clone(torch.float64), state.clone()
    norm, found = state.step(**options)
    exact_norm, _ = exact.step(adamw_8bit_reference, **options)
    twin.step(adamw_8bit_reference, **options)
    assert not found
    assert abs(norm - exact_norm) <= 16 * F32 * exact_norm
    for i, got in enumerate(state.params):
        if not got.numel():
            continue
        if got.dtype == torch.float32:
            want = exact.params[i]
            # Roundings on operands no larger than the tensor's scale: of 16 in the norm, of 9 in the value of a code
            # (0.9 mantissa - 0.8 cancels by that much), and a handful more.
            bound = 2 * (twin.params[i].double() - want).abs().max() + 32 * F32 * want.abs().max()
            assert (got.double() - want).abs().max() <= bound
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            lists = [getattr(s, name + end)[i] for s in (state, exact) for end in ("s", "_scales")]
            _check_codes(*lists, signed)
    if state.copies is not None:
        for copy, p in zip(state.copies, state.params, strict=True):
            assert same_bits(copy, p.bfloat16())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_at_every_size_on_every_isa(isa: str, grad_dtype: torch.dtype) -> None:
    decays = [0.1 * (i % 3) for i in range(len(SIZES))]
    _check(State(SIZES, grad_dtype, copies=True), weight_decay=decays, max_norm=0.5, grad_scale=4.0)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 600), max_size=6),
    grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    copies=st.booleans(),
    max_norm=st.sampled_from([None, 1e-3, 1e6]),
    grad_scale=st.sampled_from([1.0, 1024.0]),
    maximize=st.booleans(),
    step=st.sampled_from([1, 2, 10_000]),
    seed=st.integers(0, 2**16),
)
def test_any_lists_and_options(sizes, grad_dtype, copies, max_norm, grad_scale, maximize, step, seed) -> None:
    torch.manual_seed(seed)
    state = State(sizes, grad_dtype, copies=copies, scale=grad_scale)
    _check(state, step=step, weight_decay=0.1, max_norm=max_norm, grad_scale=grad_scale, maximize=maximize)


def test_the_map_is_the_papers() -> None:
    """Seven decades; 8 bits are a sign, the decade in unary, and a fraction (bitsandbytes: create_dynamic_map)."""
    for signed in (True, False):
        values = dynamic_map(signed)
        assert len(values) == len(set(values)) == 256 and values == sorted(values)
        assert values[127 if signed else 0] == 0.0 and values[255] == 1.0
    signed = dynamic_map(True)
    assert signed[128] == pytest.approx(0.55e-6) and signed[129:131] == pytest.approx([3.25e-6, 7.75e-6])
    assert signed[:127] == [-x for x in signed[254:127:-1]]
    assert dynamic_map(False)[1:3] == pytest.approx([0.325e-6, 0.775e-6])


def _one_step(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that the kernel gives to moments x: one step from moments of zero, of gradient x or its root."""
    n = x.numel()
    zeros = [torch.zeros(n, dtype=torch.uint8), torch.zeros(-(-n // BLOCK))]
    m, v = [t.clone() for t in zeros], [t.clone() for t in zeros]
    grad = x if name == "m" else x.sqrt()
    adamw_8bit_(
        [torch.zeros(n)], [grad], [m[0]], [m[1]], [v[0]], [v[1]], step=1, lr=0.0, beta1=0.0, beta2=0.0
    )  # fmt: skip
    return (m[0], m[1]) if name == "m" else (v[0], v[1])


@pytest.mark.parametrize("name", ["m", "v"])
def test_every_value_of_the_map_has_its_code(isa: str, name: str) -> None:
    """A block that holds the map itself comes back as its codes; so do values just inside the borders."""
    signed = name == "m"
    values = torch.tensor(dynamic_map(signed), dtype=torch.float64)
    codes, scales = _one_step(values.float(), name)
    assert codes.tolist() == list(range(256))
    assert scales.item() == 1.0
    middle = (values[1:] + values[:-1]) / 2
    for side, offset in ((1 - 1e-5, 0), (1 + 1e-5, 1)):
        x = torch.cat([middle * side, values[-1:]]).float()
        codes, _ = _one_step(x, name)
        below_zero = middle < 0
        expected = torch.arange(255) + torch.where(below_zero, 1 - offset, offset)
        assert codes[:255].tolist() == expected.tolist()


def test_there_is_no_minus_one(isa: str) -> None:
    """The value of largest magnitude, where it is negative, is the map's first; the others keep their codes."""
    values = torch.tensor(dynamic_map(True)).float()
    for lowest in (-1.0, -0.998):
        x = torch.cat([torch.tensor([lowest]), values[1:127], torch.zeros(1), values[128:]])
        codes, scales = _one_step(x, "m")
        assert codes.tolist() == list(range(256)) and scales.item() == 1.0
        codes, scales = _one_step(x[:255], "m")  # without 1
        assert codes[0] == 0 and scales.item() == pytest.approx(-lowest)
    codes, _ = _one_step(-0.5 * values, "m")
    assert codes[255] == 0 and codes[127] == 127


def test_scales_at_the_ends_of_floats(isa: str) -> None:
    """Codes do not depend on the scale, where its reciprocal is subnormal or as large as can be."""
    values = torch.tensor(dynamic_map(True)).float()
    for scale in (2.0**-120, 2.0**60):
        codes, scales = _one_step(values * scale, "m")
        assert scales.item() == pytest.approx(scale)
        assert codes.tolist() == list(range(256))
    codes, scales = _one_step(torch.tensor(dynamic_map(False)).float() * 2.0**127, "v")
    assert scales.item() == pytest.approx(2.0**127) and codes.tolist() == list(range(256))


def test_small_blocks_and_zeros(isa: str) -> None:
    for value in (0.0, 1e-40, 1e-30):
        codes, scales = _one_step(torch.full((300,), value), "m")
        kept = value if value >= 1e-37 else 0.0
        assert scales.tolist() == pytest.approx([kept] * 2, rel=1e-6)
        assert codes.unique().tolist() == [255 if kept else 127]
    state = State([300])
    state.grads[0] *= 1e25  # squares beyond f32
    state.step()
    assert all(t.isfinite().all() for t in state.written())


# --- bf16 parameters without masters -------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_rounding_takes_the_bits_of_philox(isa: str, grad_dtype: torch.dtype) -> None:
    """The new value is one of its two neighbours, the one that the counter's bits choose."""
    state = State(SIZES, grad_dtype, low=True)
    twin = state.clone()
    state.step(seed=2**40 + 7, step=5, weight_decay=0.1)
    twin.step(adamw_8bit_reference, seed=2**40 + 7, step=5, weight_decay=0.1)
    different = total = 0
    for p, q in zip(state.params, twin.params, strict=True):
        steps = (p.view(torch.int16).int() - q.view(torch.int16).int()).abs()
        assert p.numel() == 0 or steps.max() <= 1
        different, total = different + int(steps.sum()), total + p.numel()
    # The f32 value before the rounding differs in a few of its last bits, so its draw does once in some 2^12.
    assert different <= 2e-3 * total


def test_rounding_keeps_what_is_not_finite(isa: str) -> None:
    values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
    state = State([4 * 300], low=True)
    state.params[0][: 4 * 150] = values.repeat(150).bfloat16()
    state.step()
    got = state.params[0][: 4 * 150].float().view(150, 4)
    assert got[:, :2].isnan().all() and (got[:, 2:] == values[2:]).all()
    assert state.params[0][4 * 150 :].isfinite().all()


def test_a_rate_of_zero_changes_nothing(isa: str) -> None:
    state = State([700])
    state.grads[0][::3] = 0
    before = state.params[0].clone()
    state.step(lr=0.0, weight_decay=0.1)
    assert same_bits(state.params[0], before)


def test_random_bits_are_philoxs() -> None:
    """The known answer of Random123 for a counter and a key of zeros: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    assert random_bits_reference(0, 0, 0, 256)[[0, 128, 1, 129, 2, 130, 3, 131]].tolist() == [
        0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00,
    ]  # fmt: skip


def test_rounding_is_unbiased_and_small_steps_add_up() -> None:
    """Steps of 2^-13 vanish in bf16 weights of 1 (unit 2^-7); on average the weights follow all the same."""
    n, lr, steps = 65536, 2.0**-13, 64
    p = torch.ones(n, dtype=torch.bfloat16)
    codes = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(n // BLOCK) for _ in range(2)]
    for step in range(1, steps + 1):
        grad = torch.full((n,), -1.0)
        adamw_8bit_(
            [p], [grad], codes[:1], scales[:1], codes[1:], scales[1:], step=step, lr=lr, beta1=0.0, beta2=0.0,
            eps=0.0, seed=3,
        )  # fmt: skip
    # Each weight is 1 plus a binomial number of units: 64 draws of odds 2^-6, of deviation 2^-7 each, n weights.
    assert abs(p.double().mean().item() - (1 + lr * steps)) <= 5 * 2**-7 / math.sqrt(n)
    assert p.unique().numel() > 3


def test_seed_and_step_and_place_change_the_bits() -> None:
    start = State([2000, 2000], low=True)
    start.params[1], start.grads[1] = start.params[0].clone(), start.grads[0].clone()
    for name in LISTS[2:]:
        getattr(start, name)[1] = getattr(start, name)[0].clone()
    runs = []
    for options in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1 + 2**32}):
        state = start.clone()
        state.step(**options)
        runs.append(state.params)
    assert same_bits(runs[0][0], runs[1][0])
    assert not same_bits(runs[0][0], runs[0][1])
    assert not same_bits(runs[0][0], runs[2][0]) and not same_bits(runs[0][0], runs[3][0])


@pytest.mark.parametrize("low", [False, True])
def test_slices_with_their_places_get_the_wholes_bits(isa: str, low: bool) -> None:
    """Cut at multiples of 256, the tensors listed in another order."""
    start = State([40_000, 5000], torch.bfloat16, low=low)
    whole = start.clone()
    norm, _ = whole.step(seed=3, max_norm=1.0)
    cuts = [(1, 4096, 5000), (0, 16_640, 40_000), (0, 0, 256), (1, 0, 4096), (0, 256, 16_640)]
    sliced = State([])
    for name in LISTS:
        scales = name.endswith("scales")
        own = [
            getattr(start, name)[i][a // BLOCK : -(-b // BLOCK)] if scales else getattr(start, name)[i][a:b]
            for i, a, b in cuts
        ]
        setattr(sliced, name, [t.clone() for t in own])
    twin = sliced.clone()
    places = [(i, a) for i, a, _ in cuts]
    sliced.step(seed=3, max_norm=1.0, grad_norm=norm, places=places)
    for name in LISTS:
        for (i, a, b), got in zip(cuts, getattr(sliced, name), strict=True):
            blocks = slice(a // BLOCK, -(-b // BLOCK)) if name.endswith("scales") else slice(a, b)
            assert same_bits(got, getattr(whole, name)[i][blocks]), name
    if low:
        twin.step(seed=3, max_norm=1.0, grad_norm=norm)
        assert not same_bits(twin.params[0], sliced.params[0])


def test_the_reference_knows_places() -> None:
    state = State([2000, 600], low=True)
    twin = state.clone()
    places = [(2**32 - 1, 256 * 1000), (5, 0)]
    state.step(seed=4, places=places)
    twin.step(adamw_8bit_reference, seed=4, places=places)
    for p, q in zip(state.params, twin.params, strict=True):
        # As in test_rounding_takes_the_bits_of_philox; other bits would change half of the 2,600.
        assert (p != q).sum() <= 5


# --- guards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("low", [False, True])
def test_nothing_is_written_where_a_gradient_is_not_finite(isa: str, bad: float, low: bool) -> None:
    for position in (0, 65, 20000, 39999):
        state = State([5, 40000], low=low)
        state.grads[1][position] = bad
        before = [t.clone() for t in state.written()]
        norm, found = state.step(max_norm=1.0)
        assert found is True and not math.isfinite(norm)
        assert all(same_bits(a, b) for a, b in zip(state.written(), before, strict=True))


@pytest.mark.parametrize("low", [False, True])
def test_same_bits_for_every_thread_count_and_run(threads: None, low: bool) -> None:
    start = State([100_000, 3, 17, 40_000], torch.bfloat16, low=low, copies=not low)

    def step() -> list[torch.Tensor]:
        state = start.clone()
        norm, _ = state.step(max_norm=0.1, weight_decay=0.1)
        return [*state.written(), torch.tensor(norm, dtype=torch.float64)]

    assert_same_for_threads(step)


def test_misaligned_tensors_and_several_dimensions() -> None:
    state = State([3 * 200], torch.bfloat16, copies=True)
    for name in (*LISTS, "copies"):
        t = getattr(state, name)[0]
        shifted = torch.cat([t[:1], t])[1:]
        setattr(state, name, [shifted if name.endswith("scales") else shifted.view(3, 200)])
    _check(state, max_norm=1.0)


def test_parameters_that_require_grad_and_numpy_arrays() -> None:
    state = State([333, 5])
    other = state.clone()
    state.params = [torch.nn.Parameter(p) for p in state.params]
    arrays = [[t.numpy() for t in getattr(other, name)] for name in LISTS]
    state.step(max_norm=1.0)
    adamw_8bit_(*arrays, step=3, max_norm=1.0, **SETTINGS)
    for a, b in zip(state.params, arrays[0], strict=True):
        assert isinstance(b, np.ndarray) and same_bits(a.detach(), torch.from_numpy(b))


def _call(**changes):
    state = State([4, 300], copies=True)
    for name in (*LISTS, "copies"):
        if name in changes:
            setattr(state, name, changes.pop(name))
    before = [t.clone() for t in state.written()]
    try:
        state.step(**changes)
    finally:
        assert all(same_bits(a, b) for a, b in zip(state.written(), before, strict=True))


FOUR, MANY = torch.zeros(4), torch.zeros(300)
BAD = [
    ({"params": [FOUR, MANY.double()]}, TypeError, "'params\\[1\\]': got float64"),
    ({"params": [FOUR, MANY.bfloat16()]}, TypeError, "'params\\[1\\]': got bfloat16"),
    ({"params": [FOUR.bfloat16(), MANY.bfloat16()]}, ValueError, "'copies'"),
    ({"grads": [FOUR]}, ValueError, "'grads': got 1 entries, expected 2"),
    ({"grads": [FOUR, torch.zeros(600)[::2]]}, ValueError, "'grads\\[1\\]'.*contiguous"),
    ({"exp_avgs": [FOUR, MANY]}, TypeError, "'exp_avgs\\[0\\]': got float32"),
    (
        {"exp_avg_scales": [torch.zeros(1), torch.zeros(1)]},
        ValueError,
        "'exp_avg_scales\\[1\\]': got shape \\(1,\\)",
    ),
    ({"exp_avg_sq_scales": [torch.zeros(1)]}, ValueError, "'exp_avg_sq_scales': got 1 entries"),
    ({"weight_decay": -0.1}, ValueError, "'weight_decay\\[0\\]'"),
    ({"step": 0}, ValueError, "'step': got 0, expected 1 or more"),
    ({"lr": math.nan}, ValueError, "'lr'"),
    ({"beta1": 1.0}, ValueError, "'beta1'.*\\[0, 1\\)"),
    ({"max_norm": 0.0}, ValueError, "'max_norm'.*above 0"),
    ({"grad_scale": 0.0}, ValueError, "'grad_scale'"),
    ({"places": [(0, 0)]}, ValueError, "'places': got 1 entries, expected 2"),
    ({"places": [(0, 0), (1, 128)]}, ValueError, "'places\\[1\\]': got \\(1, 128\\).*multiple of 256"),
    ({"places": [(2**32, 0), (1, 0)]}, ValueError, "'places\\[0\\]'.*below 2\\^32"),
    ({"places": [(0, 0), (1, 2**35 - 256)]}, ValueError, "'places\\[1\\]'.*below 2\\^35"),
]


@pytest.mark.parametrize("changes, error, text", BAD)
def test_bad_input_is_named_and_nothing_written(changes, error, text: str) -> None:
    with pytest.raises(error, match=text):
        _call(**dict(changes))
