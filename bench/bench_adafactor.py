"""adafactor_: the whole optimizer step of GPT-2 124M, against torch.optim.Adafactor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from bench.bench_adamw import XL, drawn, gpt2_shapes, parameters, streams
from bench.case import ANYWHERE, ON_GPU, Callables, Case, Cost, Target

LR, EPS = 1e-2, (1e-7, 1e-3)


def _setup(shapes: Sequence[tuple[int, ...]]) -> Callable[[Target], Callables]:
    """float32: gradients in f32. bfloat16: gradients in bf16, f32 masters, bf16 copies written back.

    Ours also checks the gradients for infinities, which torch's does not. Each call is one step of the
    participant's own parameters; the harness compares the first of them after the first step.
    """

    def setup(target: Target) -> Callables:
        import torch

        low = target.dtype != "float32"
        start, grads = drawn(tuple(shapes), target.dtype, target.device)
        calls = {"gptcore": _our_step(start, grads, low)}
        forms = {"torch_eager": False, "torch_foreach": True}
        if target.quick and parameters(shapes) > 1e8:
            # 12% slower than the loop there, and a fifth of the time of all optimizers.
            del forms["torch_foreach"]
        for name, foreach in forms.items():
            params = [torch.nn.Parameter(p.clone()) for p in start]
            optimizer = torch.optim.Adafactor(params, lr=LR, eps=EPS, foreach=foreach)
            calls[name] = _torch_step(params, grads, optimizer, low)
        return calls

    return setup


def _our_step(start: list, grads: list, low: bool, in_blocks: bool = False) -> Callable[[], list]:
    import torch

    from gptcore.ops.adafactor import adafactor_

    function = _step_in_blocks if in_blocks else adafactor_
    params = [p.clone() for p in start]
    copies = [p.bfloat16() for p in start] if low else None
    matrix = [p.ndim > 1 for p in params]
    rows = [torch.zeros(*p.shape[:-1], 1) if m else None for p, m in zip(params, matrix, strict=True)]
    cols = [
        torch.zeros(*p.shape[:-2], 1, p.shape[-1]) if m else None for p, m in zip(params, matrix, strict=True)
    ]
    variances = [None if m else torch.zeros_like(p) for p, m in zip(params, matrix, strict=True)]
    steps = iter(range(1, 1 << 62))

    def step() -> list[torch.Tensor]:
        t = next(steps)
        function(
            params, grads, rows, cols, variances, step_size=min(LR, t**-0.5), beta2=1 - t**-0.8, eps=EPS,
            eps_added=False, copies=copies,
        )  # fmt: skip
        return params[:8]

    return step


def _setup_blocks(shapes: Sequence[tuple[int, ...]]) -> Callable[[Target], Callables]:
    """The step of an owner of slices who has all of them whole, its norm by blocks, against the step of tensors."""

    def setup(target: Target) -> Callables:
        low = target.dtype != "float32"
        start, grads = drawn(tuple(shapes), target.dtype, target.device)
        return {
            "gptcore": _our_step(start, grads, low, in_blocks=True),
            "gptcore_plain": _our_step(start, grads, low),
        }

    return setup


def _step_in_blocks(params: list, grads: list, *states: list, **options) -> None:
    from gptcore.ops.adafactor_blocks import adafactor_blocks_
    from gptcore.ops.grad_norm import square_sums

    sums, found_inf = square_sums(grads)
    assert not found_inf
    wholes = [(p.shape, 0) for p in params]
    norm = math.sqrt(sums.numpy().sum())
    phases = adafactor_blocks_(params, grads, *states, wholes, grad_norm=norm, **options)
    updates = phases.send(next(phases))
    with suppress(StopIteration):
        phases.send(updates)


def _torch_step(params: list, grads: list, optimizer, low: bool) -> Callable[[], list]:
    """torch doing the same, with casts where the dtype asks for them."""
    import torch

    copies = [p.detach().bfloat16() for p in params] if low else None
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to(torch.float32)
    held = [p.grad for p in params]

    def step() -> list:
        if copies is not None:
            torch._foreach_copy_(held, grads)
        optimizer.step()
        if copies is not None:
            torch._foreach_copy_(copies, [p.detach() for p in params])
        return [p.detach() for p in params[:8]]

    return step


def _cost(shapes: Sequence[tuple[int, ...]]) -> Callable[[int], Cost]:
    """The gradient twice (statistics, update), p read and written; its RMS reads it from the caches."""
    count = sum(math.prod(shape) for shape in shapes)

    def cost(element: int) -> Cost:
        copy = 2 if element == 2 else 0
        moved = streams(count, element, 4)
        return Cost(12.0 * count, (4 + 2 * element) * count, (4 + copy) * count, True, moved)

    return cost


_GPT2 = gpt2_shapes()
_XL = gpt2_shapes(*XL)
_MANY = [(64, 64)] * 1000
_FEW = [(64, 64)] * 4

CASES = [
    Case("adafactor/gpt2_124m/step", _setup(_GPT2), _cost(_GPT2), repeats=7, quick="float32"),
    Case("adafactor/gpt2_124m_in_blocks/step", _setup_blocks(_GPT2), _cost(_GPT2), repeats=7, quick=False),
    Case("adafactor/gpt2_xl/step", _setup(_XL), _cost(_XL), repeats=7, devices=ON_GPU),
    Case("adafactor/1000_tensors_64x64/step", _setup(_MANY), _cost(_MANY), devices=ANYWHERE),
    Case("adafactor/4_tensors_64x64/step", _setup(_FEW), _cost(_FEW), small=True),
]
