"""The tolerance rule of every kernel test, in one place.

The oracle is the op's reference in float64. A kernel's error may be at most twice the error that torch's own
path makes in the same dtype, plus a floor for the roundings that even a perfect kernel makes: one rounding of
the result to its dtype, and sqrt(terms) roundings of f32 for a sum of that many terms (rounding errors add like
a random walk). Everything is measured against the tensor's own scale, elementwise where it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


def error_bound(
    exact: torch.Tensor,
    twin: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    terms: int = 1,
    summand: float = 0.0,
) -> float:
    """Largest error allowed: twice that of ``twin`` (torch in the same dtype), plus the rounding floor.

    ``summand`` is the size of what is added up where that can cancel to something much smaller: f32 roundings
    are of that size then, not of the result's.
    """
    scale = exact.abs().max().item() if exact.numel() else 0.0
    f32 = ROUNDOFF[torch.float32] * max(terms, 1) ** 0.5
    floor = ROUNDOFF[dtype] * scale + 2 * f32 * max(scale, summand)
    twin_error = 0.0 if twin is None or not exact.numel() else (twin.double() - exact).abs().max().item()
    return 2 * twin_error + floor


def assert_close_to_exact(
    got: torch.Tensor,
    exact: torch.Tensor,
    twin: torch.Tensor | None = None,
    *,
    terms: int = 1,
    summand: float = 0.0,
    what: str = "output",
) -> None:
    """``got`` must be finite where ``exact`` is, and within :func:`error_bound` of it."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what}: finite in other places than the oracle"
    got64, exact64 = got.double()[finite], exact.double()[finite]
    twin64 = None if twin is None else twin.double()[finite]
    bound = error_bound(exact64, twin64, got.dtype, terms=terms, summand=summand)
    error = (got64 - exact64).abs().max().item() if got64.numel() else 0.0
    assert error <= bound, f"{what}: error {error:.3e} exceeds {bound:.3e}"


def value_and_gradients(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of ``function(*inputs)`` and the gradients of all inputs under ``grad_outputs``."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    gradients = torch.autograd.grad(
        outputs, leaves, [g.to(o.dtype) for g, o in zip(grad_outputs, outputs, strict=True)]
    )
    return [o.detach() for o in outputs], list(gradients)


def check_against_float64(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    grad_outputs: Sequence[torch.Tensor],
    *,
    terms: int = 1,
    summand: float = 0.0,
) -> None:
    """Values and gradients of ``kernel`` against ``reference`` in float64; the yardstick is torch in the same dtype."""
    got, got_gradients = value_and_gradients(kernel, inputs, grad_outputs)
    exact, exact_gradients = value_and_gradients(reference, [x.double() for x in inputs], grad_outputs)
    twin, twin_gradients = value_and_gradients(reference, inputs, grad_outputs)
    for i, (a, b, c) in enumerate(zip(got, exact, twin, strict=True)):
        assert_close_to_exact(a, b, c, terms=terms, what=f"output {i}")
    for i, (a, b, c) in enumerate(zip(got_gradients, exact_gradients, twin_gradients, strict=True)):
        assert_close_to_exact(a, b, c, terms=terms, summand=summand, what=f"gradient of input {i}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality; NaNs equal each other and 0 differs from -0."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}.get(a.element_size(), torch.uint8)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def assert_same_for_threads(
    function: Callable[[], Sequence[torch.Tensor]], counts: Sequence[int] = (1, 2, 4), repeats: int = 2
) -> None:
    """``function`` gives the same bits on every run and thread count. Use with the ``threads`` fixture."""
    from gptcore import backend

    expected: Sequence[torch.Tensor] | None = None
    for count in counts:
        backend.set_num_threads(count)
        for _ in range(repeats):
            got = function()
            if expected is None:
                expected = [x.clone() for x in got]
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                assert same_bits(a, b), f"output {i} changed with {count} threads"
