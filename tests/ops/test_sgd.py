from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.ops.grad_norm import grad_norm, grad_norm_reference
from gptcore.ops.sgd import sgd_, sgd_reference
from tests.tolerance import ROUNDOFF, assert_same_for_threads, same_bits

SIZES = [*range(0, 34), 63, 64, 65, 16383, 16384, 16385, 40000]
FORMS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.9, "nesterov": True}]


class State:
    """Parameters, gradients and buffers of the given sizes, after some imagined steps."""

    LISTS = ("params", "momentum_buffers")

    def __init__(
        self, sizes, grad_dtype=torch.float32, *, copies: bool = False, buffers: bool = True, scale=1.0
    ) -> None:
        self.params = [torch.randn(n) for n in sizes]
        self.grads = [(torch.randn(n) * scale).to(grad_dtype) for n in sizes]
        self.momentum_buffers = [torch.randn(n) for n in sizes] if buffers else None
        self.copies = [torch.zeros(n, dtype=torch.bfloat16) for n in sizes] if copies else None

    def clone(self, dtype: torch.dtype = torch.float32) -> State:
        other = State([])
        for name in self.LISTS:
            tensors = getattr(self, name)
            setattr(other, name, tensors and [t.to(dtype, copy=True) for t in tensors])
        other.grads = [g.to(dtype) if dtype == torch.float64 else g for g in self.grads]
        other.copies = None if self.copies is None else [c.clone() for c in self.copies]
        return other

    def step(self, function=sgd_, **options):
        options = {"lr": 0.02, **options}
        return function(self.params, self.grads, self.momentum_buffers, copies=self.copies, **options)

    def tensors(self) -> list[torch.Tensor]:
        return [t for name in (*self.LISTS, "copies") for t in getattr(self, name) or []]


def _check(state: State, **options) -> None:
    exact, twin = state.clone(torch.float64), state.clone()
    norm, found = state.step(**options)
    assert not found
    if norm is not None:
        exact_norm, _ = grad_norm_reference(exact.grads, options.get("grad_scale", 1.0))
        # f32 partial sums over chunks of 16384 in 64 lanes: 256 roundings of half a unit, a walk of 16.
        assert abs(norm - exact_norm) <= 16 * ROUNDOFF[torch.float32] * exact_norm
    # From the same norm: what it is off by is no error of the update.
    exact.step(sgd_reference, **options, grad_norm=norm)
    twin.step(sgd_reference, **options, grad_norm=norm)
    for name in State.LISTS:
        for got, want, torchs in zip(*(getattr(s, name) or [] for s in (state, exact, twin)), strict=True):
            if not got.numel():
                continue
            # A handful of roundings on operands no larger than the tensor's scale; torch makes as many.
            bound = 2 * (torchs.double() - want).abs().max() + 4 * ROUNDOFF[torch.float32] * want.abs().max()
            assert (got.double() - want).abs().max() <= bound, name
    for copy, p in zip(state.copies or [], state.params, strict=state.copies is not None):
        assert same_bits(copy, p.bfloat16())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_matches_float64_at_every_size_on_every_isa(isa: str, grad_dtype: torch.dtype, form: dict) -> None:
    decays = [0.1 * (i % 3) for i in range(len(SIZES))]
    first = [i % 5 == 0 for i in range(len(SIZES))]
    state = State(SIZES, grad_dtype, copies=True, buffers=bool(form))
    _check(state, weight_decay=decays, first=first, max_norm=0.5, grad_scale=4.0, **form)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), max_size=6),
    grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    copies=st.booleans(),
    form=st.sampled_from(FORMS),
    signs=st.fixed_dictionaries(
        {"first": st.booleans(), "maximize": st.booleans(), "check_finite": st.booleans()}
    ),
    weight_decay=st.sampled_from([0.0, 0.1]),
    max_norm=st.sampled_from([None, 1e-3, 1e6]),
    grad_scale=st.sampled_from([1.0, 1024.0]),
    seed=st.integers(0, 2**16),
)
def test_any_lists_and_options(
    sizes, grad_dtype, copies, form, signs, weight_decay, max_norm, grad_scale, seed
) -> None:
    torch.manual_seed(seed)
    state = State(sizes, grad_dtype, copies=copies, buffers=bool(form), scale=grad_scale)
    _check(state, weight_decay=weight_decay, max_norm=max_norm, grad_scale=grad_scale, **form, **signs)


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}, {"maximize": True}])
def test_follows_torch_over_a_hundred_steps(options: dict) -> None:
    ours = State([300, 7])
    params = [torch.nn.Parameter(p.clone()) for p in ours.params]
    optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1, **options)
    for step in range(100):
        ours.grads = [torch.randn_like(p) for p in ours.params]
        for p, g in zip(params, ours.grads, strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(params, 5.0)
        optimizer.step()
        ours.step(lr=0.01, momentum=0.9, weight_decay=0.1, first=step == 0, max_norm=5.0, **options)
    for p, q in zip(ours.params, params, strict=True):
        # 100 steps of a few roundings of 2^-24 on values near 1, which momentum sums ten times.
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-4)


def test_a_first_step_does_not_read_the_buffer() -> None:
    state = State([100, 7])
    other = state.clone()
    for b in state.momentum_buffers:
        b.fill_(math.nan)
    for each in (state, other):
        each.step(momentum=0.9, dampening=0.5, first=True)
    assert all(same_bits(a, b) for a, b in zip(state.tensors(), other.tensors(), strict=True))
    assert all(same_bits(b, g) for b, g in zip(state.momentum_buffers, state.grads, strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_where_a_gradient_is_not_finite(isa: str, bad: float, grad_dtype) -> None:
    for position in (0, 65, 39999):
        state = State([5, 40000], grad_dtype, copies=True)
        state.grads[1][position] = bad
        before = [t.clone() for t in state.tensors()]
        for options in ({}, {"max_norm": 1.0, "check_finite": False}):
            norm, found = state.step(momentum=0.9, **options)
            assert found is True and not math.isfinite(norm)
            assert all(same_bits(a, b) for a, b in zip(state.tensors(), before, strict=True))
        assert state.step(momentum=0.9, check_finite=False) == (None, False)
        assert not state.params[1][position].isfinite()


def test_a_known_norm_gives_the_same_bits_in_parts() -> None:
    state = State([1000, 50_000, 7])
    parts = state.clone()
    norm, _ = state.step(momentum=0.9, max_norm=0.5)
    assert grad_norm(parts.grads) == (norm, False)
    for i in range(3):
        part = State([])
        for name in (*State.LISTS, "grads"):
            setattr(part, name, getattr(parts, name)[i : i + 1])
        assert part.step(momentum=0.9, max_norm=0.5, grad_norm=norm) == (norm, False)
    assert all(same_bits(a, b) for a, b in zip(state.tensors(), parts.tensors(), strict=True))


def test_same_bits_for_every_thread_count_and_run(threads: None) -> None:
    start = State([100_000, 3, 17, 40_000], torch.bfloat16, copies=True)

    def step() -> list[torch.Tensor]:
        state = start.clone()
        norm, _ = state.step(momentum=0.9, nesterov=True, max_norm=0.1, weight_decay=0.1)
        return [*state.tensors(), torch.tensor(norm, dtype=torch.float64)]

    assert_same_for_threads(step)


def test_misaligned_tensors_and_several_dimensions() -> None:
    def views(dtype=torch.float32):
        return [torch.rand(61, dtype=torch.float32).to(dtype)[1:].view(3, 20)]

    state = State([])
    state.params, state.grads, state.momentum_buffers = (views() for _ in range(3))
    state.copies = views(torch.bfloat16)
    _check(state, momentum=0.9, max_norm=1.0)


def test_parameters_that_require_grad_and_numpy_arrays() -> None:
    state = State([33, 5])
    other = state.clone()
    state.params = [torch.nn.Parameter(p) for p in state.params]
    arrays = [[t.numpy() for t in list_] for list_ in (other.params, other.grads, other.momentum_buffers)]
    state.step(momentum=0.9, max_norm=1.0)
    sgd_(*arrays, lr=0.02, momentum=0.9, max_norm=1.0)
    for a, b in zip(state.params, arrays[0], strict=True):
        assert isinstance(b, np.ndarray) and same_bits(a.detach(), torch.from_numpy(b))


BAD = [
    ({"params": [torch.zeros(4), torch.zeros(5).double()]}, TypeError, "'params\\[1\\]': got float64"),
    ({"grads": [torch.zeros(4)]}, ValueError, "'grads': got 1 entries, expected 2"),
    ({"grads": [torch.zeros(4), torch.zeros(6)]}, ValueError, "'grads\\[1\\]': got shape \\(6,\\)"),
    ({"momentum_buffers": [torch.zeros(4)]}, ValueError, "'momentum_buffers': got 1 entries, expected 2"),
    (
        {"momentum_buffers": None, "momentum": 0.9},
        ValueError,
        "'momentum': got 0.9.*without momentum_buffers",
    ),
    (
        {"copies": [torch.zeros(4), torch.zeros(5)]},
        TypeError,
        "'copies\\[0\\]': got float32, expected bfloat16",
    ),
    ({"weight_decay": -0.1}, ValueError, "'weight_decay\\[0\\]'"),
    ({"first": [True]}, ValueError, "'first': got 1 entries"),
    ({"lr": math.nan}, ValueError, "'lr'"),
    ({"momentum": -0.1}, ValueError, "'momentum'.*0 or more"),
    ({"dampening": 1.5}, ValueError, "'dampening'.*\\[0, 1\\]"),
    ({"nesterov": True}, ValueError, "'nesterov': got True, expected a momentum above 0 and dampening 0"),
    ({"max_norm": 0.0}, ValueError, "'max_norm'.*above 0"),
    ({"max_norm": 1.0, "grad_norm": math.inf}, ValueError, "'grad_norm': got inf"),
    ({"grad_scale": 0.0}, ValueError, "'grad_scale'"),
]


@pytest.mark.parametrize("changes, error, text", BAD)
def test_bad_input_is_named_and_nothing_written(changes, error, text: str) -> None:
    state = State([4, 5], copies=True)
    options = dict(changes)
    for name in (*State.LISTS, "grads", "copies"):
        if name in options:
            setattr(state, name, options.pop(name))
    before = [t.clone() for t in state.tensors()]
    with pytest.raises(error, match=text):
        state.step(**options)
    assert all(same_bits(a, b) for a, b in zip(state.tensors(), before, strict=True))
