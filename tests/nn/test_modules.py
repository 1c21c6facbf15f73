"""gptcore.nn against torch.nn: arguments, state dict, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from gptcore import backend, nn

EPS = {torch.float32: torch.finfo(torch.float32).eps, torch.bfloat16: torch.finfo(torch.bfloat16).eps}

# name: (constructor arguments, input shape)
CASES: dict[str, tuple[str, tuple, dict, tuple[int, ...]]] = {
    "linear": ("Linear", (40, 24), {}, (3, 5, 40)),
    "linear-no-bias": ("Linear", (40, 24), {"bias": False}, (7, 40)),
    "linear-large": ("Linear", (96, 130), {}, (2, 70, 96)),
    "linear-thin": ("Linear", (96, 8), {}, (150, 96)),
    "linear-short-sums": ("Linear", (8, 96), {}, (150, 8)),
    "linear-vector": ("Linear", (40, 24), {}, (40,)),
    "layer-norm": ("LayerNorm", (24,), {}, (3, 5, 24)),
    "layer-norm-2d": ("LayerNorm", ((4, 6),), {}, (3, 4, 6)),
    "layer-norm-no-bias": ("LayerNorm", (24,), {"bias": False, "eps": 1e-3}, (3, 24)),
    "layer-norm-plain": ("LayerNorm", (24,), {"elementwise_affine": False}, (3, 24)),
    "rms-norm": ("RMSNorm", (24,), {"eps": 1e-6}, (3, 5, 24)),
    "rms-norm-2d-default-eps": ("RMSNorm", ((4, 6),), {}, (3, 4, 6)),
    "rms-norm-plain": ("RMSNorm", (24,), {"elementwise_affine": False}, (3, 24)),
    "gelu": ("GELU", (), {}, (3, 25)),
    "gelu-tanh": ("GELU", ("tanh",), {}, (3, 25)),
    "silu": ("SiLU", (), {}, (3, 25)),
}


def _pair(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, with the same random parameters."""
    kind, args, options, _ = CASES[name]
    ours, theirs = getattr(nn, kind)(*args, **options), getattr(torch.nn, kind)(*args, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def _run(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient and parameter gradients."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(4)).to(
        y.dtype
    )
    gradients = torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])
    return [y.detach(), *gradients]


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype):
    ours, theirs = _pair(name, dtype)
    x = torch.randn(CASES[name][3], dtype=torch.float32, generator=torch.Generator().manual_seed(2)).to(dtype)
    got, same = _run(ours, x), _run(theirs, x)
    exact = _run(theirs.double(), x.double())
    for a, b, c in zip(got, same, exact, strict=True):
        assert a.dtype == dtype
        # twice torch's own error in this dtype, and a floor where torch is lucky: two roundings, and for a
        # sum over N rows, in one chain where torch sums pairwise, the random walk of N f32 roundings
        walk = torch.finfo(torch.float32).eps * math.sqrt(x.numel() // x.shape[-1])
        assert _error(a, c) <= 2 * _error(b, c) + 2 * EPS[dtype] + walk
    with torch.no_grad():
        assert _error(ours(x), exact[0]) <= 2 * _error(same[0], exact[0]) + 2 * EPS[dtype]


@pytest.mark.parametrize("name", CASES)
def test_state_dict_names_and_repr(name: str):
    ours, theirs = _pair(name, torch.float32)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))


def test_same_initialisation_as_torch():
    torch.manual_seed(3)
    ours = nn.Linear(5, 4)
    torch.manual_seed(3)
    assert torch.equal(ours.weight, torch.nn.Linear(5, 4).weight)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_embedding(dtype: torch.dtype, padding_idx: int | None):
    ours = nn.Embedding(11, 6, padding_idx=padding_idx, dtype=dtype)
    theirs = torch.nn.Embedding(11, 6, padding_idx=padding_idx, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.tensor([[3, 1, 3, 10], [0, 3, 5, 1]])
    assert torch.equal(ours(ids), theirs(ids))
    for module in (ours, theirs):
        module(ids).pow(2).sum().backward()
    # sums of at most three rows
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=2 * EPS[dtype], atol=1e-7)
    if padding_idx is not None:
        assert not ours.weight.grad[padding_idx].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_zero_centred_norms_start_as_the_plain_ones_and_add_one(kind: str, dtype: torch.dtype):
    ours = getattr(nn, kind)((4, 6), eps=1e-5, zero_centred=True, dtype=dtype)
    theirs = getattr(torch.nn, kind)((4, 6), eps=1e-5, dtype=dtype)
    assert not ours.weight.any() and list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 4, 6).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), theirs(x), rtol=4 * eps, atol=4 * eps)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(4, 6))
        theirs = theirs.double()
        theirs.weight.copy_(ours.weight.double() + 1)
    # One rounding of the result, a few of f32 before; a factor of at most 5.
    torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=4 * eps, atol=4 * eps)
    with pytest.raises(ValueError, match="zero_centred.*without a weight"):
        getattr(nn, kind)(6, elementwise_affine=False, zero_centred=True)
    backend.reset_report()


def test_what_no_kernel_covers_goes_to_torch_and_is_reported():
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "layer_norm": lambda: nn.LayerNorm(6, dtype=torch.float64)(torch.ones(2, 6, dtype=torch.float64)),
        "rms_norm": lambda: nn.RMSNorm(6, dtype=torch.float16)(torch.ones(2, 6, dtype=torch.float16)),
        "gelu": lambda: nn.GELU()(torch.ones(3, dtype=torch.float64)),
        "silu": lambda: nn.SiLU(inplace=True)(torch.ones(3)),
        "embedding": lambda: nn.Embedding(4, 3, max_norm=1.0)(torch.tensor([1])),
    }
    for call, run in calls.items():
        backend.reset_report()
        run()
        assert list(backend.report()) == [call]
    backend.reset_report()


def test_inplace_silu_writes_its_input():
    x = torch.tensor([1.0, -2.0])
    assert nn.SiLU(inplace=True)(x) is x


def test_linear_errors_are_torchs():
    ours, theirs = nn.Linear(5, 4), torch.nn.Linear(5, 4)
    x = torch.ones(2, 6)
    with pytest.raises(RuntimeError) as expected:
        theirs(x)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(RuntimeError) as got:
            ours(x)
        assert str(got.value) == str(expected.value)
    for empty in (torch.ones(0, 5), torch.ones(3, 0, 5)):
        assert ours(empty).shape == theirs(empty).shape
    with pytest.raises(RuntimeError):
        ours(x.double())


def test_linear_gradients_only_where_wanted():
    layer = nn.Linear(5, 4)
    layer.weight.requires_grad_(False)
    x = torch.ones(2, 5, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((4,), 2.0))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 5))


def test_linear_under_autocast_is_bf16():
    layer = nn.Linear(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(70, 64)).dtype == torch.bfloat16


def test_linear_second_derivative_is_refused():
    layer = nn.Linear(5, 4)
    x = torch.ones(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_linear_without_fixed_order_is_the_same_map(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    ours, _ = _pair("linear-large", dtype)
    x = torch.randn(2, 70, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    fixed = _run(ours, x)
    monkeypatch.setattr("gptcore.nn.linear._fixed_order", False)
    for a, b in zip(_run(ours, x), fixed, strict=True):
        assert _error(a, b.double()) < 2 * EPS[dtype] + 16 * torch.finfo(torch.float32).eps
