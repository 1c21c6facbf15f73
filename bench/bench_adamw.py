"""adamw_: the whole optimizer step with global norm, clip, check for infinities and bf16 copies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from bench.case import ANYWHERE, ON_GPU, Callables, Case, Cost, Target

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


def block_shapes(layers: int, c: int = 768) -> list[tuple[int, ...]]:
    """The parameter tensors of GPT-2's blocks, without embeddings and the last norm."""
    block: list[tuple[int, ...]] = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,)]
    block += [(4 * c, c), (4 * c,), (c, 4 * c), (c,)]
    return block * layers


def gpt2_shapes(layers: int = 12, c: int = 768) -> list[tuple[int, ...]]:
    """The 148 parameter tensors of GPT-2 124M, head tied; or those of a larger one."""
    return [(50257, c), (1024, c), *block_shapes(layers, c), (c,), (c,)]


# GPT-2 1.5B.
XL = (48, 1600)


def parameters(shapes: Sequence[tuple[int, ...]]) -> int:
    """Elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes)


@functools.lru_cache(maxsize=3)
def drawn(shapes: tuple[tuple[int, ...], ...], dtype: str, device: str = "cpu") -> tuple[list, list]:
    """Parameters in f32 and gradients in ``dtype``: one set for all optimizers, which clone what they write to.

    Drawing those of GPT-2 takes as long as measuring it. Three are kept: the large one and the small ones between.
    """
    target = Target(dtype, device)
    grads = [target.randn(*shape, scale=1e-3) for shape in shapes]
    return [target.randn(*shape, dtype="float32", scale=0.02) for shape in shapes], grads


def streams(count: int, element: int, state: int, *, norm: bool = True) -> tuple[tuple[str, float], ...]:
    """(kind, bytes) of a step that updates ``state`` bytes of f32 a parameter by gradients of ``element`` bytes.

    The norm reads the gradients. f32 ones then go into the first array of the state; as many bytes of bf16 ones are
    read as of the bf16 copies written. What is left of the state is updated in place.
    """
    low = element == 2
    mixed = ("copy", 4.0 * count) if low else ("update", 12.0 * count)
    in_place = 2.0 * count * (state if low else state - 4)
    return ("read", float(element * count if norm else 0)), mixed, ("in_place", in_place)


def _setup(
    shapes: Sequence[tuple[int, ...]],
    *,
    amsgrad: bool = False,
    decoupled: bool = True,
    maximize: bool = False,
    split: bool = False,
) -> Callable[[Target], Callables]:
    """float32: gradients in f32. bfloat16: gradients in bf16, f32 masters, bf16 copies written back.

    ``split``: the masters in two halves, which is compared at bf16's precision.

    Both participants own a full set of parameters and states; each call is one step of it and returns
    the first parameters, which the harness compares after the first step.
    """

    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.adamw import adamw_, split_master

        low = target.dtype != "float32"
        start, grads = drawn(tuple(shapes), target.dtype, target.device)
        mine = [p.clone() for p in start]
        copies = [p.bfloat16() for p in start] if low and not split else None
        lows = None
        if split:
            mine, lows = (list(halves) for halves in zip(*map(split_master, start), strict=True))
        moments = [[torch.zeros_like(p) for p in start] for _ in range(2)]
        largest = [torch.zeros_like(p) for p in start] if amsgrad else None
        steps = iter(range(1, 1 << 62))
        options = {"amsgrad": amsgrad, "maximize": maximize}

        def ours() -> list[torch.Tensor]:
            adamw_(
                mine, grads, *moments, step=next(steps), lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS,
                weight_decay=WEIGHT_DECAY, copies=copies, max_norm=MAX_NORM, max_exp_avg_sqs=largest, lows=lows,
                decoupled=decoupled, maximize=maximize,
            )  # fmt: skip
            return mine[:8]

        return {"gptcore": ours, "torch_eager": _torch_step(start, grads, low, decoupled, options)}

    return setup


def _torch_step(
    start: list, grads: list, low: bool, decoupled: bool, options: dict[str, bool]
) -> Callable[[], list]:
    """torch doing the same: clip by foreach, fused AdamW or Adam, and casts where the dtype asks for them."""
    import torch

    kind = torch.optim.AdamW if decoupled else torch.optim.Adam

    params = [torch.nn.Parameter(p.clone()) for p in start]
    copies = [p.bfloat16() for p in start] if low else None
    optimizer = kind(
        params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True, **options
    )  # fmt: skip
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to(torch.float32, copy=True)
    held = [p.grad for p in params]

    def step() -> list:
        # The clip scales in place. f32 gradients are left so: the next clip does the same work on them, and a
        # copy would charge torch for two streams that a training step does not have.
        if copies is not None:
            torch._foreach_copy_(held, grads)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        if copies is not None:
            torch._foreach_copy_(copies, [p.detach() for p in params])
        return [p.detach() for p in params[:8]]

    return step


def _cost(
    shapes: Sequence[tuple[int, ...]], amsgrad: bool = False, split: bool = False
) -> Callable[[int], Cost]:
    """Two reads of the gradient (norm, update), p m v (w) read and written, the bf16 copy written."""
    count = parameters(shapes)
    state = 16 if amsgrad else 12

    def cost(element: int) -> Cost:
        copy = 2 if element == 2 and not split else 0
        moved = () if split else streams(count, element, state)
        return Cost(20.0 * count, (state + 2 * element) * count, (state + copy) * count, True, moved)

    return cost


_GPT2 = gpt2_shapes()
_MANY = [(64, 64)] * 1000
_ONE_SMALL = [(64, 64)] * 4
_BLOCKS = block_shapes(4)  # 28M parameters: half a gigabyte with its state, far beyond any cache

CASES = [
    Case("adamw/gpt2_124m/step", _setup(_GPT2), _cost(_GPT2), repeats=7, quick="float32"),
    Case(
        "adamw/gpt2_124m_split_master/step",
        _setup(_GPT2, split=True),
        _cost(_GPT2, split=True),
        dtypes=("bfloat16",),
        repeats=7,
        quick=False,
    ),
    Case("adamw/gpt2_xl/step", _setup(gpt2_shapes(*XL)), _cost(gpt2_shapes(*XL)), repeats=7, devices=ON_GPU),
    Case("adamw/1000_tensors_64x64/step", _setup(_MANY), _cost(_MANY), devices=ANYWHERE),
    Case("adamw/4_tensors_64x64/step", _setup(_ONE_SMALL), _cost(_ONE_SMALL), small=True),
    Case(
        "adamw/blocks_28m_amsgrad/step",
        _setup(_BLOCKS, amsgrad=True),
        _cost(_BLOCKS, amsgrad=True),
        quick=False,
    ),
    Case(
        "adamw/blocks_28m_l2_maximize/step",
        _setup(_BLOCKS, decoupled=False, maximize=True),
        _cost(_BLOCKS),
        quick=False,
    ),
]
