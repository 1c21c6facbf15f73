from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.ops.adamw import adamw_, adamw_reference, join_master, split_master
from gptcore.ops.grad_norm import grad_norm
from tests.tolerance import ROUNDOFF, assert_same_for_threads, same_bits

SETTINGS = {"lr": 0.02, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
# Every size from none to beyond two AVX-512 vectors, four running sums, and more than one chunk of 16384.
SIZES = [*range(0, 34), 63, 64, 65, 16383, 16384, 16385, 40000]


class State:
    """Parameters, gradients and moments of the given sizes, after some imagined steps."""

    LISTS = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")

    def __init__(
        self, sizes, grad_dtype=torch.float32, *, copies: bool = False, amsgrad: bool = False, scale=1.0
    ) -> None:
        self.params = [torch.randn(n) for n in sizes]
        self.grads = [(torch.randn(n) * scale).to(grad_dtype) for n in sizes]
        self.exp_avgs = [torch.randn(n) * 0.1 for n in sizes]
        self.exp_avg_sqs = [torch.rand(n) * 0.1 for n in sizes]
        self.max_exp_avg_sqs = [torch.rand(n) * 0.1 for n in sizes] if amsgrad else None
        self.copies = [torch.zeros(n, dtype=torch.bfloat16) for n in sizes] if copies else None

    def clone(self, dtype: torch.dtype = torch.float32) -> State:
        other = State([])
        for name in self.LISTS:
            tensors = getattr(self, name)
            setattr(other, name, tensors and [t.to(dtype, copy=True) for t in tensors])
        other.grads = [g.to(dtype) if dtype == torch.float64 else g for g in self.grads]
        other.copies = None if self.copies is None else [c.clone() for c in self.copies]
        return other

    def step(self, function=adamw_, **options):
        return function(
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, copies=self.copies,
            max_exp_avg_sqs=self.max_exp_avg_sqs, **{**SETTINGS, "step": 3, **options},
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        return [t for name in (*self.LISTS, "copies") for t in getattr(self, name) or []]


def _check(state: State, **options) -> None:
    exact, twin = state.clone(torch.float64), state.clone()
    norm, found = state.step(**options)
    exact_norm, _ = exact.step(adamw_reference, **options)
    twin.step(adamw_reference, **options)
    assert not found
    count = sum(g.numel() for g in state.grads)
    # f32 partial sums over chunks of 16384 in 64 lanes: 256 roundings of half a unit at worst, a walk of 16.
    assert abs(norm - exact_norm) <= 16 * ROUNDOFF[torch.float32] * exact_norm, count
    for name in State.LISTS:
        for got, want, torchs in zip(*(getattr(s, name) or [] for s in (state, exact, twin)), strict=True):
            if not got.numel():
                continue
            # A handful of roundings on operands no larger than the tensor's scale; torch makes as many.
            bound = 2 * (torchs.double() - want).abs().max() + 4 * ROUNDOFF[torch.float32] * want.abs().max()
            assert (got.double() - want).abs().max() <= bound, name
    if state.copies is not None:
        for copy, p in zip(state.copies, state.params, strict=True):
            assert same_bits(copy, p.bfloat16())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_at_every_size_on_every_isa(isa: str, grad_dtype: torch.dtype) -> None:
    decays = [0.1 * (i % 3) for i in range(len(SIZES))]
    _check(State(SIZES, grad_dtype, copies=True), weight_decay=decays, max_norm=0.5, grad_scale=4.0)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_options_match_float64_on_every_isa(isa: str, amsgrad: bool, decoupled: bool) -> None:
    for grad_dtype, copies in ((torch.float32, False), (torch.bfloat16, True)):
        state = State([0, 1, 33, 64, 16385], grad_dtype, copies=copies, amsgrad=amsgrad)
        decays = [0.1 * (i % 3) for i in range(5)]
        _check(state, weight_decay=decays, decoupled=decoupled, maximize=True, max_norm=0.5)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), max_size=6),
    grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    copies=st.booleans(),
    amsgrad=st.booleans(),
    signs=st.fixed_dictionaries({"decoupled": st.booleans(), "maximize": st.booleans()}),
    max_norm=st.sampled_from([None, 1e-3, 1e6]),
    grad_scale=st.sampled_from([1.0, 1024.0]),
    step=st.sampled_from([1, 2, 10_000]),
    seed=st.integers(0, 2**16),
)
def test_any_lists_and_options(
    sizes, grad_dtype, copies, amsgrad, signs, max_norm, grad_scale, step, seed
) -> None:
    torch.manual_seed(seed)
    state = State(sizes, grad_dtype, copies=copies, amsgrad=amsgrad, scale=grad_scale)
    _check(state, step=step, weight_decay=0.1, max_norm=max_norm, grad_scale=grad_scale, **signs)


def test_steps_are_written_where_the_update_is() -> None:
    state = State([4, 5])
    steps = [torch.tensor(6.0), torch.zeros(1)]
    state.step(step=7, steps=steps)
    assert steps == [7, 7]
    state.grads[0][0] = math.nan
    state.step(step=8, steps=steps)
    assert steps == [7, 7]


def test_ascent_is_descent_on_the_other_sign() -> None:
    state = State([1000])
    other = state.clone()
    other.grads = [-g for g in state.grads]
    state.step(maximize=True, max_norm=0.5)
    other.step(max_norm=0.5)
    assert all(same_bits(a, b) for a, b in zip(state.tensors(), other.tensors(), strict=True))


def test_a_known_norm_gives_the_same_bits_in_parts() -> None:
    state = State([1000, 50_000, 7])
    parts = state.clone()
    norm, _ = state.step(max_norm=0.5)
    assert grad_norm(parts.grads) == (norm, False)
    for i in range(3):
        part = State([])
        for name in (*State.LISTS[:3], "grads"):
            setattr(part, name, getattr(parts, name)[i : i + 1])
        assert part.step(max_norm=0.5, grad_norm=norm) == (norm, False)
    assert all(same_bits(a, b) for a, b in zip(state.tensors(), parts.tensors(), strict=True))


def test_follows_torch_over_a_hundred_steps() -> None:
    state = State([300, 7])
    ours = state.clone()
    params = [torch.nn.Parameter(p.clone()) for p in state.params]
    optimizer = torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    ours.exp_avgs = [torch.zeros_like(p) for p in ours.params]
    ours.exp_avg_sqs = [torch.zeros_like(p) for p in ours.params]
    for step in range(1, 101):
        ours.grads = [torch.randn_like(p) for p in ours.params]
        for p, g in zip(params, ours.grads, strict=True):
            p.grad = g.clone()
        torch_norm = torch.nn.utils.clip_grad_norm_(params, 5.0)
        optimizer.step()
        norm, _ = ours.step(
            step=step, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_norm=5.0
        )
        assert norm == pytest.approx(torch_norm.item(), rel=1e-5)
    for p, q in zip(ours.params, params, strict=True):
        # 100 steps of lr 0.01, each a few roundings of a value near 1.
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_where_a_gradient_is_not_finite(isa: str, bad: float, grad_dtype) -> None:
    for position in (0, 16, 65, 20000, 39999):
        state = State([5, 40000], grad_dtype, copies=True)
        state.grads[1][position] = bad
        before = [t.clone() for t in state.tensors()]
        norm, found = state.step(max_norm=1.0)
        assert found is True and not math.isfinite(norm)
        assert all(same_bits(a, b) for a, b in zip(state.tensors(), before, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e20, 1e30])
def test_norm_survives_squares_beyond_f32(scale: float) -> None:
    state = State([100, 30000], scale=scale)
    exact = math.sqrt(sum(g.double().square().sum().item() for g in state.grads))
    norm, found = state.step(max_norm=1.0)
    assert not found
    assert norm == pytest.approx(exact, rel=1e-6)
    assert all(t.isfinite().all() for t in state.tensors())


def test_gradients_stay_as_they_are_and_zero_gradients_only_decay() -> None:
    state = State([50])
    grad = state.grads[0].clone()
    state.step(max_norm=0.1, grad_scale=8.0)
    assert same_bits(state.grads[0], grad)
    state.grads[0].zero_(), state.exp_avgs[0].zero_()
    expected = state.params[0] * (1 - SETTINGS["lr"] * 0.5)
    norm, _ = state.step(weight_decay=0.5)
    assert norm == 0.0
    torch.testing.assert_close(state.params[0], expected, rtol=1e-6, atol=0)


def test_same_bits_for_every_thread_count_and_run(threads: None) -> None:
    start = State([100_000, 3, 17, 40_000], torch.bfloat16, copies=True, amsgrad=True)

    def step() -> list[torch.Tensor]:
        state = start.clone()
        norm, _ = state.step(max_norm=0.1, weight_decay=0.1, decoupled=False)
        return [*state.tensors(), torch.tensor(norm, dtype=torch.float64)]

    assert_same_for_threads(step)


def test_misaligned_tensors_and_several_dimensions() -> None:
    def views(dtype=torch.float32):
        return [torch.rand(61, dtype=torch.float32).to(dtype)[1:].view(3, 20)]

    state = State([])
    state.params, state.grads, state.exp_avgs, state.exp_avg_sqs = (views() for _ in range(4))
    state.copies = views(torch.bfloat16)
    _check(state, max_norm=1.0)


def test_parameters_that_require_grad_and_numpy_arrays() -> None:
    state = State([33, 5])
    other = state.clone()
    state.params = [torch.nn.Parameter(p) for p in state.params]
    arrays = [
        [t.numpy() for t in list_] for list_ in (other.params, other.grads, other.exp_avgs, other.exp_avg_sqs)
    ]
    state.step(max_norm=1.0)
    adamw_(*arrays, step=3, max_norm=1.0, **SETTINGS)
    for a, b in zip(state.params, arrays[0], strict=True):
        assert isinstance(b, np.ndarray) and same_bits(a.detach(), torch.from_numpy(b))


# --- split masters -----------------------------------------------------------------------------------------


def _identity_step(weight: torch.Tensor, low: torch.Tensor) -> None:
    """lr 0 and no moments: p * 1 - 0 / (0 + eps), which is p, for every finite p."""
    zeros = [torch.zeros(weight.shape) for _ in range(3)]
    adamw_([weight], [zeros[0]], [zeros[1]], [zeros[2]], step=1, lr=0.0, lows=[low], grad_norm=0.0)


LOWS = [0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x1234, 0xABCD]


def test_every_weight_takes_every_kind_of_remainder(isa: str) -> None:
    """All 65536 upper halves with the telling lower ones: the Python twins and the kernel keep every number."""
    bits = (torch.arange(65536, dtype=torch.int64) << 16)[:, None] + torch.tensor(LOWS)
    master = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32).flatten()
    master = master[~master.isnan()]
    weight, low = split_master(master)
    assert same_bits(join_master(weight, low), master)
    # Nearest, so no further than half a unit, and away from zero on a tie; beyond the largest bf16 it is inf.
    ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert same_bits(weight[~ties], master.bfloat16()[~ties])
    assert (weight[ties].double().abs() > master[ties].double().abs()).all()
    before = weight.clone(), low.clone()
    _identity_step(weight, low)
    assert same_bits(weight, before[0]) and same_bits(low, before[1])


@pytest.mark.long
def test_all_finite_patterns_of_f32_survive_the_kernel(isa: str) -> None:
    upper = torch.cat([torch.arange(0, 0x7F80), torch.arange(-0x8000, -0x80)]).to(torch.int16)
    zeros = [torch.zeros(64, len(upper)) for _ in range(3)]
    for first in range(0, 65536, 64):
        lower = torch.arange(first, first + 64)[:, None]
        want_weight = upper + (lower >= 0x8000).to(torch.int16)
        want_low = ((lower ^ 0x8000) - 0x8000).to(torch.int16).expand(64, len(upper)).contiguous()
        weight, low = want_weight.clone().view(torch.bfloat16), want_low.clone()
        grads, exp_avgs, exp_avg_sqs = ([t] for t in zeros)
        adamw_([weight], grads, exp_avgs, exp_avg_sqs, step=1, lr=0.0, lows=[low], grad_norm=0.0)
        assert torch.equal(weight.view(torch.int16), want_weight) and torch.equal(low, want_low), first


@pytest.mark.long
def test_all_patterns_of_f32_survive_the_python_twins() -> None:
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for first in range(0, 65536, 64):
        bits = (upper + torch.arange(first, first + 64, dtype=torch.int32)[:, None]).flatten()
        weight, low = split_master(bits.view(torch.float32))
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        assert ((join_master(weight, low).view(torch.int32) == bits) | nan).all(), first
        assert torch.equal(weight.isnan(), nan), first


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_split_masters_take_the_steps_of_whole_ones(isa: str, grad_dtype: torch.dtype, amsgrad: bool) -> None:
    """Bit for bit over steps, at every size, with L2 too; the weights are the masters' rounding."""
    whole = State(SIZES, grad_dtype, copies=True, amsgrad=amsgrad)
    halves = whole.clone()
    halves.params, lows = (list(t) for t in zip(*map(split_master, whole.params), strict=True))
    halves.copies = None
    for step in range(1, 4):
        options = {"step": step, "weight_decay": 0.1, "decoupled": step == 2, "max_norm": 0.5}
        assert whole.step(**options) == halves.step(lows=lows, **options)
    for p, copy, weight, low in zip(whole.params, whole.copies, halves.params, lows, strict=True):
        assert same_bits(join_master(weight, low), p)
        ties = (p.view(torch.int32) & 0xFFFF) == 0x8000
        assert same_bits(weight[~ties], copy[~ties])
    for name in State.LISTS[1:]:
        for a, b in zip(getattr(whole, name) or [], getattr(halves, name) or [], strict=True):
            assert same_bits(a, b)


def test_a_split_step_by_the_reference() -> None:
    """The reference's arithmetic is torch's, so the masters agree to roundings: a few on numbers up to 5."""
    state = State([1000])
    weight, low = split_master(state.params[0])
    twin_weight, twin_low = weight.clone(), low.clone()
    state.params = [weight]
    twin = state.clone()
    twin.params = [twin_weight]
    state.step(lows=[low], weight_decay=0.1)
    twin.step(adamw_reference, lows=[twin_low], weight_decay=0.1)
    got, want = join_master(weight, low), join_master(twin_weight, twin_low)
    torch.testing.assert_close(got, want, rtol=0, atol=4 * 2**-22)


def test_a_weight_set_to_zero_is_zero() -> None:
    """Below a zero there are only NaNs: the remainder of the weight that was there must not make one."""
    weight = torch.tensor([0.0, -0.0, 0.0, 1.0]).bfloat16()
    low = torch.tensor([-5, -5, 7, -5], dtype=torch.int16)
    want = join_master(weight, low)
    assert want.isfinite().all() and same_bits(want[:2], torch.tensor([0.0, -0.0]))
    _identity_step(weight, low)
    assert same_bits(join_master(weight, low), want)


def test_split_masters_that_overflow_become_nan() -> None:
    """NaN has no remainder, and its weight says so, whatever the lower half of its pattern was."""
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
    weight, low = split_master(patterns.view(torch.float32))
    assert weight.isnan().all() and not low.any()
    weight, low = torch.tensor([3e38]).bfloat16(), torch.zeros(1, dtype=torch.int16)
    options = {"step": 1, "lr": 1e38, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
    adamw_([weight], [torch.zeros(1)], [torch.zeros(1)], [torch.zeros(1)], lows=[low], **options)
    assert weight.isnan().all() and low.item() == 0  # 0 / 0


def _call(**changes):
    state = State([4, 5], copies=True)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "copies"):
        if name in changes:
            setattr(state, name, changes.pop(name))
    before = [t.clone() for t in state.tensors()]
    try:
        state.step(**changes)
    finally:
        assert all(same_bits(a, b) for a, b in zip(state.tensors(), before, strict=True))


BAD = [
    (
        {"params": [torch.zeros(4), torch.zeros(5, dtype=torch.float64)]},
        TypeError,
        "'params\\[1\\]': got float64",
    ),
    ({"grads": [torch.zeros(4)]}, ValueError, "'grads': got 1 entries, expected 2"),
    ({"grads": [torch.zeros(4), torch.zeros(6)]}, ValueError, "'grads\\[1\\]': got shape \\(6,\\)"),
    ({"grads": [torch.zeros(4), torch.zeros(10)[::2]]}, ValueError, "'grads\\[1\\]'.*contiguous"),
    ({"exp_avgs": [torch.zeros(4), torch.zeros(5).bfloat16()]}, TypeError, "'exp_avgs\\[1\\]'"),
    (
        {"copies": [torch.zeros(4), torch.zeros(5)]},
        TypeError,
        "'copies\\[0\\]': got float32, expected bfloat16",
    ),
    ({"weight_decay": [0.1]}, ValueError, "'weight_decay': got 1 entries"),
    ({"weight_decay": -0.1}, ValueError, "'weight_decay\\[0\\]'"),
    ({"step": 0}, ValueError, "'step': got 0, expected 1 or more"),
    ({"max_exp_avg_sqs": [torch.zeros(4)]}, ValueError, "'max_exp_avg_sqs': got 1 entries, expected 2"),
    (
        {"lows": [torch.zeros(4), torch.zeros(5)]},
        TypeError,
        "'params\\[0\\]': got float32, expected bfloat16",
    ),
    ({"steps": [torch.zeros(())]}, ValueError, "'steps': got 1 entries, expected 2"),
    (
        {"steps": [torch.zeros(()), torch.zeros(2)]},
        ValueError,
        "'steps\\[1\\]': got float32 \\(2,\\), expected one",
    ),
    ({"steps": [torch.zeros(()), torch.tensor(1)]}, TypeError, "'steps\\[1\\]': got int64, expected float32"),
    ({"grad_norm": math.nan}, ValueError, "'grad_norm': got nan, expected a finite number"),
    ({"lr": math.nan}, ValueError, "'lr'"),
    ({"beta1": 1.0}, ValueError, "'beta1'.*\\[0, 1\\)"),
    ({"max_norm": 0.0}, ValueError, "'max_norm'.*above 0"),
    ({"grad_scale": 0.0}, ValueError, "'grad_scale'"),
]


@pytest.mark.parametrize("changes, error, text", BAD)
def test_bad_input_is_named_and_nothing_written(changes, error, text: str) -> None:
    with pytest.raises(error, match=text):
        _call(**dict(changes))
