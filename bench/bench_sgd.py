"""sgd_: the whole optimizer step with global norm, clip, check for infinities and bf16 copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.bench_adamw import XL, drawn, gpt2_shapes, parameters, streams
from bench.case import ANYWHERE, ON_GPU, Callables, Case, Cost, Target

LR, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.1, 1.0


def _setup(
    shapes: Sequence[tuple[int, ...]], *, clip: bool = True, **form: Any
) -> Callable[[Target], Callables]:
    """float32: gradients in f32. bfloat16: gradients in bf16, f32 masters, bf16 copies written back.

    Without ``clip`` neither side looks at the gradients first.
    """

    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.sgd import sgd_

        low = target.dtype != "float32"
        start, grads = drawn(tuple(shapes), target.dtype, target.device)
        mine = [p.clone() for p in start]
        copies = [p.bfloat16() for p in start] if low else None
        buffers = [torch.zeros_like(p) for p in start] if form.get("momentum") else None

        def ours() -> list[torch.Tensor]:
            sgd_(
                mine, grads, buffers, lr=LR, weight_decay=WEIGHT_DECAY, copies=copies, check_finite=clip,
                max_norm=MAX_NORM if clip else None, **form,
            )  # fmt: skip
            return mine[:8]

        return {"gptcore": ours, "torch_eager": _torch_step(start, grads, low, clip, form)}

    return setup


def _torch_step(start: list, grads: list, low: bool, clip: bool, form: dict[str, Any]) -> Callable[[], list]:
    """torch doing the same: clip by foreach, fused SGD, and casts where the dtype asks for them."""
    import torch

    params = [torch.nn.Parameter(p.clone()) for p in start]
    copies = [p.bfloat16() for p in start] if low else None
    optimizer = torch.optim.SGD(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True, **form)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to(torch.float32, copy=True)
    held = [p.grad for p in params]

    def step() -> list:
        # The clip scales in place; see bench_adamw.
        if copies is not None:
            torch._foreach_copy_(held, grads)
        if clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        if copies is not None:
            torch._foreach_copy_(copies, [p.detach() for p in params])
        return [p.detach() for p in params[:8]]

    return step


def _cost(
    shapes: Sequence[tuple[int, ...]], *, clip: bool = True, momentum: bool = True
) -> Callable[[int], Cost]:
    """One or two reads of the gradient (norm, update), p and b read and written, the bf16 copy written."""
    count = parameters(shapes)
    state = 8 if momentum else 4

    def cost(element: int) -> Cost:
        copy = 2 if element == 2 else 0
        passes = 2 if clip else 1
        moved = streams(count, element, state, norm=clip)
        return Cost(10.0 * count, (state + passes * element) * count, (state + copy) * count, True, moved)

    return cost


_GPT2 = gpt2_shapes()
_XL = gpt2_shapes(*XL)
_MANY = [(64, 64)] * 1000
_MOMENTUM = {"momentum": 0.9}

CASES = [
    Case("sgd/gpt2_124m_momentum/step", _setup(_GPT2, **_MOMENTUM), _cost(_GPT2), repeats=7, quick="float32"),
    Case(
        "sgd/gpt2_124m_nesterov/step",
        _setup(_GPT2, nesterov=True, **_MOMENTUM),
        _cost(_GPT2),
        repeats=7,
        quick=False,
    ),
    Case(
        "sgd/gpt2_124m_momentum_no_clip/step",
        _setup(_GPT2, clip=False, **_MOMENTUM),
        _cost(_GPT2, clip=False),
        repeats=7,
        quick=False,
    ),
    Case("sgd/gpt2_124m_plain/step", _setup(_GPT2), _cost(_GPT2, momentum=False), repeats=7, quick=False),
    Case("sgd/gpt2_xl/step", _setup(_XL, **_MOMENTUM), _cost(_XL), repeats=7, devices=ON_GPU),
    Case("sgd/1000_tensors_64x64/step", _setup(_MANY, **_MOMENTUM), _cost(_MANY), devices=ANYWHERE),
    Case("sgd/4_tensors_64x64/step", _setup([(64, 64)] * 4, **_MOMENTUM), _cost([(64, 64)] * 4), small=True),
]
