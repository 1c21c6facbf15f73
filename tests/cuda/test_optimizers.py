"""Optimizer steps whose numbers lie on the device: the bits of those by plain numbers, and nothing to wait for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gptcore import optim
from gptcore.ops.adafactor import adafactor_
from gptcore.ops.adamw import adamw_
from gptcore.ops.adamw_8bit import BLOCK, adamw_8bit_
from gptcore.ops.grad_norm import grad_norm, square_sums
from gptcore.ops.sgd import sgd_
from gptcore.optim.slices import Whole
from tests.tolerance import same_bits

# Around four elements, a block of 256 and chunks of 8,192, with nothing in between.
SIZES = [5, 0, 8192, 1, 8193, 255, 20_001]


class Step:
    """One optimizer's tensors, and a step of theirs."""

    def __init__(self, name: str, sizes: list[int]) -> None:
        self.name = name
        generator = torch.Generator().manual_seed(len(sizes))

        def normal(n: int) -> torch.Tensor:
            return torch.randn(n, generator=generator)

        self.params, self.grads = [normal(n) for n in sizes], [normal(n) for n in sizes]
        self.steps = [torch.tensor(4.0) for _ in sizes]
        if name == "adamw_8bit":
            self.states = [
                [torch.zeros(n, dtype=torch.uint8) for n in sizes], [torch.zeros(-(-n // BLOCK)) for n in sizes],
                [torch.zeros(n, dtype=torch.uint8) for n in sizes], [torch.zeros(-(-n // BLOCK)) for n in sizes],
            ]  # fmt: skip
        elif name == "adamw":
            self.states = [[normal(n) for n in sizes], [normal(n).square() for n in sizes]]
        else:
            self.states = [[normal(n) for n in sizes]]

    def __call__(self, **options: Any) -> Any:
        function: Callable[..., Any] = {"adamw": adamw_, "adamw_8bit": adamw_8bit_, "sgd": sgd_}[self.name]
        options = {"lr": 0.02, "weight_decay": 0.1, "max_norm": 0.5, **options}
        if self.name == "sgd":
            options = {"momentum": 0.9, **options}
            options = {key: value for key, value in options.items() if key not in ("step", "steps")}
        return function(self.params, self.grads, *self.states, **options)

    def written(self) -> list[torch.Tensor]:
        return [*self.params, *(t for state in self.states for t in state), *self.steps]


def _results() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((), math.nan, dtype=torch.float64), torch.ones((), dtype=torch.bool)


NAMES = ["adamw", "adamw_8bit", "sgd"]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_in_tensors_give_the_bits_of_plain_ones(isa: str, name: str) -> None:
    plain, held = Step(name, SIZES), Step(name, SIZES)
    norm, found = plain(step=5, grad_scale=4.0, steps=plain.steps)
    out = _results()
    lr, scale = torch.tensor(0.02, dtype=torch.float64), torch.tensor([4.0])
    assert held(step=None, lr=lr, grad_scale=scale, steps=held.steps, out=out) is out
    assert (out[0].item(), out[1].item()) == (norm, found) == (norm, False)
    assert all(same_bits(a, b) for a, b in zip(plain.written(), held.written(), strict=True))
    if name != "sgd":
        assert held.steps == [5.0] * len(SIZES)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_given_as_a_tensor_and_a_norm_taken_before(isa: str, name: str) -> None:
    plain, held = Step(name, SIZES), Step(name, SIZES)
    norm, _ = plain(step=5, grad_scale=4.0)
    known = grad_norm(held.grads, torch.tensor(4.0), out=_results())
    out = _results()
    held(step=torch.tensor(5), grad_scale=4.0, grad_norm=known[0], out=out)
    assert out[0].item() == known[0].item() == norm and not out[1]
    assert all(same_bits(a, b) for a, b in zip(plain.written(), held.written(), strict=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_leaves_everything_and_counts_nothing(isa: str, name: str, bad: float) -> None:
    for known in (False, True):
        step = Step(name, SIZES)
        step.grads[-1][20_000] = bad
        before = [t.clone() for t in step.written()]
        out = _results()
        given = grad_norm(step.grads, out=_results())[0] if known else None
        step(step=None, steps=step.steps, grad_norm=given, out=out)
        assert out[1].item() and not out[0].isfinite()
        assert all(same_bits(a, b) for a, b in zip(step.written(), before, strict=True))


@pytest.mark.parametrize(("name", "count"), [("adamw", 450), ("adamw_8bit", 320), ("sgd", 500)])
def test_more_tensors_than_a_launch_takes(isa: str, name: str, count: int) -> None:
    """A launch's parameters hold a few hundred: each tensor's bits are those of a call of its own."""
    sizes = [i % 23 + (i % 3 > 0) for i in range(count)]
    together, alone = Step(name, sizes), Step(name, sizes)
    norm, _ = together(step=3)
    for i in range(0, count, 49):
        one = Step(name, [])
        one.params, one.grads = alone.params[i : i + 1], alone.grads[i : i + 1]
        one.states = [state[i : i + 1] for state in alone.states]
        one(step=3, grad_norm=norm)
        assert all(same_bits(a[i], b[i]) for a, b in zip(together.states, alone.states, strict=True))
        assert same_bits(together.params[i], alone.params[i])


def test_the_norm_of_a_thousand_tensors(isa: str) -> None:
    grads = [torch.full((1,), 2.0) for _ in range(1000)]
    assert grad_norm(grads)[0] == pytest.approx(math.sqrt(4000), rel=1e-15)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_tensors_count_for_themselves_on_a_device(name: str, isa: str) -> None:
    """Without a step, one call takes tensors of several counts; the processor refuses them."""
    mixed = Step(name, [300, 300])
    mixed.steps[1].fill_(9.0)
    if isa != "simt":
        with pytest.raises(ValueError, match=r"'steps\[1\]': got 9.*the count of the others, 4"):
            mixed(step=None, steps=mixed.steps)
        return
    mixed(step=None, steps=mixed.steps)
    assert mixed.steps == [5.0, 10.0]
    for i, count in enumerate((5, 10)):
        one = Step(name, [300, 300])
        one(step=count)
        assert same_bits(one.params[i], mixed.params[i])


@pytest.mark.parametrize("name", NAMES)
def test_no_elements_have_a_result_too(isa: str, name: str) -> None:
    out = _results()
    Step(name, [0, 0])(step=1, out=out)
    assert out[0].item() == 0.0 and not out[1]
    out = _results()
    Step(name, [0, 0])(step=1, grad_norm=torch.tensor(2.0), out=out)
    assert out[0].item() == 2.0 and not out[1]


def test_sums_of_blocks_by_a_scale_on_the_device(isa: str) -> None:
    grads = [torch.randn(3000), torch.randn(100).bfloat16()]
    sums, found = square_sums(grads, 1024, torch.tensor(8.0))
    again, _ = square_sums(grads, 1024, 8.0)
    assert same_bits(sums, again) and found is False


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": torch.zeros(2)}, ValueError, r"'lr': got float32 \(2,\), expected one element"),
        ({"lr": torch.tensor(1, dtype=torch.int32)}, TypeError, "'lr': got int32"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "'lr': got -1"),
        ({"grad_scale": torch.tensor(0.0)}, ValueError, "'grad_scale'"),
        ({"grad_norm": torch.zeros(3)}, ValueError, "'grad_norm'.*one element"),
        ({"out": (torch.zeros(()), torch.ones((), dtype=torch.bool))}, TypeError, r"'out\[0\]': got float32"),
        (
            {"out": (torch.zeros((), dtype=torch.float64), torch.ones(2, dtype=torch.bool))},
            ValueError,
            r"'out\[1\]'.*one element",
        ),
    ],
)
def test_bad_numbers_are_named_and_nothing_written(isa: str, options: dict, error, text: str) -> None:
    for name in NAMES:
        step = Step(name, [5, 7])
        before = [t.clone() for t in step.written()]
        with pytest.raises(error, match=text):
            step(step=1, **options)
        assert all(same_bits(a, b) for a, b in zip(step.written(), before, strict=True))


def test_no_step_and_nothing_to_count_in(isa: str) -> None:
    for name in ("adamw", "adamw_8bit"):
        with pytest.raises(ValueError, match="'step': got None, expected a number, or steps"):
            Step(name, [5])(step=None)


# --- Adafactor: matrices, slices of matrices and vectors ----------------------------------------------------------

SHAPES = [(70, 300), (5,), (3, 9, 40), (0, 4), (66_000,)]


class Factored:
    """Adafactor's tensors; one count for each."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.params, self.grads = [normal(s) for s in SHAPES], [normal(s) for s in SHAPES]
        matrix = [len(s) > 1 for s in SHAPES]
        self.rows = [torch.ones(*s[:-1], 1) if m else None for s, m in zip(SHAPES, matrix, strict=True)]
        self.cols = [
            torch.ones(*s[:-2], 1, s[-1]) if m else None for s, m in zip(SHAPES, matrix, strict=True)
        ]
        self.variances = [None if m else torch.ones(s) for s, m in zip(SHAPES, matrix, strict=True)]
        self.steps = [torch.tensor(4.0) for _ in SHAPES]

    def __call__(self, **options: Any) -> Any:
        lists = (self.params, self.grads, self.rows, self.cols, self.variances)
        return adafactor_(
            *lists, **{"step_size": 0.02, "beta2": 0.7, "steps": self.steps, "max_norm": 0.5, **options}
        )

    def written(self) -> list[torch.Tensor]:
        lists = (self.params, self.rows, self.cols, self.variances, self.steps)
        return [t for each in lists for t in each if t is not None]


def test_adafactors_numbers_in_tensors_give_the_bits_of_plain_ones(isa: str) -> None:
    plain, held = Factored(), Factored()
    norm, found = plain(weight_decay=0.2, grad_scale=4.0)
    out = _results()
    shape = (len(SHAPES),) if isa == "simt" else ()  # one for each is a device's
    wide = {"dtype": torch.float64}
    numbers = {"step_size": torch.full(shape, 0.02, **wide), "beta2": torch.full(shape, 0.7, **wide)}
    held(weight_decay=0.1, decay_factor=torch.tensor(2.0), grad_scale=torch.tensor(4.0), out=out, **numbers)
    assert (out[0].item(), out[1].item()) == (norm, found) == (norm, False)
    assert all(same_bits(a, b) for a, b in zip(plain.written(), held.written(), strict=True))
    assert held.steps == [5.0] * len(SHAPES)


def test_a_skipped_step_of_adafactor_leaves_everything_and_counts_nothing(isa: str) -> None:
    for known in (False, True):
        step = Factored()
        step.grads[0][69, 299] = math.inf
        before = [t.clone() for t in step.written()]
        out = _results()
        step(grad_norm=grad_norm(step.grads, out=_results())[0] if known else None, out=out)
        assert out[1].item() and not out[0].isfinite()
        assert all(same_bits(a, b) for a, b in zip(step.written(), before, strict=True))


# --- the optimizers' own Python, of tensors on a GPU that nobody can look at --------------------------------------


class Recorder:
    """Stands where the native module does and notes what it is called with: fake tensors have no memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., tuple[float, bool]]:
        def call(*arguments: Any) -> tuple[float, bool]:
            self.calls.append((name, arguments))
            return 0.0, False

        return call


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("gptcore.backend.extension", lambda: recorder)
    return recorder


OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {"amsgrad": True}),
    (optim.AdamW, {"split_master": True}),
    (optim.Adam, {"capturable": True}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.AdamW8bit, {}),
    (optim.AdamW8bit, {"master_weights": False}),
    (optim.Adafactor, {}),
    (optim.Adafactor, {"variant": "palm"}),
    (optim.Adafactor, {"variant": "hf", "relative_step": False, "scale_parameter": False, "beta1": 0.9}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_wait_for_nothing(recorder: Recorder, kind: Any, options: dict, dtype: torch.dtype) -> None:
    """A fake tensor refuses to be a number or an answer: so does what would wait for the device."""
    with FakeTensorMode():
        rate = torch.zeros((), dtype=torch.float64, device="cuda")
        params = [torch.nn.Parameter(torch.empty(n, 70, device="cuda", dtype=dtype)) for n in (3, 80)]
        groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:]}]
        optimizer = kind(groups, lr=rate, max_norm=1.0, **options)
        scaler = optim.LossScaler()
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p)
            scaled = scaler.scale(torch.zeros((), device="cuda"))
            assert scaled.is_cuda
            applied = scaler.step(optimizer, micro_batches=2)
            assert applied.is_cuda and applied.dtype == torch.bool
        norm, found_inf = optimizer.last_grad_norm, optimizer.found_inf
        assert norm.is_cuda and norm.dtype == torch.float64 and found_inf.is_cuda
        for p in params:
            state = optimizer.state[p]
            assert "step" not in state or state["step"].is_cuda
            assert all(t.is_cuda for t in state.values())
        assert recorder.calls and any(argument is rate for argument in recorder.calls[-1][1])


@pytest.mark.parametrize("variant", ["torch", "palm"])
def test_steps_of_slices_wait_for_nothing(recorder: Recorder, variant: str) -> None:
    """Matrices cut between blocks of rows, whose sums stay on the device."""
    with FakeTensorMode():
        params = []
        for start, stop in ((0, 48), (48, 70)):
            params.append(torch.nn.Parameter(torch.empty((stop - start) * 64, device="cuda")))
            params[-1].whole = Whole(70 * 64, (70, 64), start * 64, 0)
        optimizer = optim.Adafactor(params, lr=1e-2, variant=variant, max_norm=1.0)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert optimizer.last_grad_norm.is_cuda and optimizer.found_inf.is_cuda
        for p in params:
            assert all(t.is_cuda for t in optimizer.state[p].values())
    phases = [call for name, call in recorder.calls if name == "adafactor_blocks"]
    assert [call[0] for call in phases] == [1, 2, 3] * 2
    assert all(t.is_cuda for call in phases for lists in call[-3:] for t in lists)


def test_a_scale_on_a_device_goes_the_way_of_the_hosts() -> None:
    """Through growth, overflows down to the least scale, and back; state goes from one to the other."""
    settings: dict[str, Any] = {"init_scale": 64.0, "growth_interval": 3, "minimum": 8.0, "patience": 4}
    here, held = optim.LossScaler(**settings), optim.LossScaler(**settings)
    held._hold(torch.device("cpu"))  # as update does where found_inf lies on a GPU
    for found in [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1]:
        here.update(bool(found))
        held._update_held(torch.tensor(bool(found)))
        assert held.state_dict() == here.state_dict()
        assert held.collapsed() == here.collapsed()
        assert held.factor.item() == here.factor == here.get_scale()
    held.restart(32.0)
    assert held.factor.item() == held.get_scale() == 32.0
    held.load_state_dict(here.state_dict())
    assert held.state_dict() == here.state_dict()
