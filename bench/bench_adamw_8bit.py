"""adamw_8bit_: the step of GPT-2 124M with 8-bit moments, against torch's fused AdamW with moments in f32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bench.bench_adamw import BETAS, EPS, LR, MAX_NORM, WEIGHT_DECAY, XL, drawn, gpt2_shapes
from bench.case import ANYWHERE, ON_GPU, Callables, Case, Cost, Target

Shapes = Sequence[tuple[int, ...]]


def _setup(shapes: Shapes, clip: bool) -> Callable[[Target], Callables]:
    """float32: parameters and gradients in f32. bfloat16: both in bf16, without masters.

    torch's parameters, gradients and moments are f32 in both cases: what 8 bits stand in for. Ours checks the
    gradients for infinities also where nothing is clipped, which torch's does not. The harness compares the
    first parameters after the first step.
    """

    def setup(target: Target) -> Callables:
        import torch

        start, grads = drawn(tuple(shapes), "float32", target.device)
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = torch.optim.AdamW(
            params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()  # the clip scales it in place

        def theirs() -> list[torch.Tensor]:
            if clip:
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()
            return [p.detach() for p in params[:8]]

        return {"gptcore": _our_step(start, grads, target, clip), "torch_fused_f32": theirs}

    return setup


def _our_step(start: list, grads: list, target: Target, clip: bool) -> Callable[[], list]:
    import torch

    from gptcore.ops.adamw_8bit import BLOCK, adamw_8bit_

    mine = [p.to(target.torch_dtype, copy=True) for p in start]
    held = [g.to(target.torch_dtype, copy=True) for g in grads]
    codes = [[torch.zeros(p.shape, dtype=torch.uint8) for p in mine] for _ in range(2)]
    scales = [[torch.zeros(-(-p.numel() // BLOCK)) for p in mine] for _ in range(2)]
    steps = iter(range(1, 1 << 62))

    def ours() -> list[torch.Tensor]:
        adamw_8bit_(
            mine, held, codes[0], scales[0], codes[1], scales[1], step=next(steps), lr=LR, beta1=BETAS[0],
            beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY, max_norm=MAX_NORM if clip else None,
        )  # fmt: skip
        return mine[:8]

    return ours


def _cost(shapes: Shapes) -> Callable[[int], Cost]:
    """Two reads of the gradient (norm, update); p, the codes and one f32 for 256 of each read and written."""
    count = sum(math.prod(shape) for shape in shapes)

    def cost(element: int) -> Cost:
        state = 2 + 8 / 256
        return Cost(60.0 * count, (3 * element + state) * count, (element + state) * count, in_place=True)

    return cost


_GPT2 = gpt2_shapes()
_XL = gpt2_shapes(*XL)
_MANY = [(64, 64)] * 1000
_FEW = [(64, 64)] * 4

CASES = [
    Case("adamw_8bit/gpt2_124m/step", _setup(_GPT2, clip=True), _cost(_GPT2), repeats=7, quick="float32"),
    Case(
        "adamw_8bit/gpt2_124m_unclipped/step", _setup(_GPT2, clip=False), _cost(_GPT2), repeats=7, quick=False
    ),
    Case("adamw_8bit/gpt2_xl/step", _setup(_XL, clip=True), _cost(_XL), repeats=7, devices=ON_GPU),
    Case("adamw_8bit/1000_tensors_64x64/step", _setup(_MANY, clip=True), _cost(_MANY), devices=ANYWHERE),
    Case("adamw_8bit/4_tensors_64x64/step", _setup(_FEW, clip=True), _cost(_FEW), small=True),
]
